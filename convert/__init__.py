"""Converts checkpoints from other formats to diffusers' layout or to Orbax."""

from convert.conversion import convert as convert
from convert.paella import convert_paella as convert_paella
from convert.single import convert_single as convert_single
