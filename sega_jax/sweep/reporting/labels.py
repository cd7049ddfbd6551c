"""Makes the labels of plots fit, in any script."""

import math
from collections.abc import Sequence
from typing import Any

from sega_jax.pipelines.captions import Font, Segment, distinct
from sega_jax.pipelines.fonts import announce, files

_MEASURE = Font(100)
# The default font of matplotlib, DejaVu Sans, is wider than the font that measures labels.
_EM = 100 / 1.15
_LINE = 1.25  # the distance between lines, as a multiple of the font size
_LEGEND = 120  # the maximum width of labels in the legend, in points
_ROTATED = 110  # the maximum length of rotated labels, in points
_WIDTH, _HEIGHT = 0.86, 0.75  # the shares of a figure's size that the plot and the legend have
_LARGEST = 60  # the maximum width and height of a figure, in inches


def arrange(axes: Any, categories: Sequence[str], *, resize: bool) -> None:
    """Wraps, rotates or shortens the labels of a plot, and selects fonts that have their characters.

    Args:
        axes: the matplotlib axes, with names, ticks and, if there is one, the legend.
        categories: the labels of the horizontal axis if its values are not numbers; otherwise, nothing.
        resize: whether the figure may grow so that all labels have space.
    """
    texts = [axes.xaxis.label, axes.yaxis.label]
    legend = axes.get_legend()
    if legend is not None:
        texts += [legend.get_title(), *legend.get_texts()]
    contents = [*categories, *(text.get_text() for text in texts)]
    announce(contents)
    if legend is not None:
        _arrange_legend(axes.figure, legend, resize)
    if categories:
        _arrange_categories(axes, categories, resize)
    width, height = _points(axes)
    axes.set_xlabel(_wrapped(axes.get_xlabel(), axes.xaxis.label.get_fontsize(), width, 2))
    axes.set_ylabel(_wrapped(axes.get_ylabel(), axes.yaxis.label.get_fontsize(), height, 2))
    families = _families(contents)
    for text in (*axes.findobj(lambda one: hasattr(one, "set_parse_math")), *axes.get_xticklabels()):
        text.set_parse_math(False)  # dollar signs in prompts and file names do not start formulas
        if families:
            text.set_fontfamily([*text.get_fontfamily(), *families])


def _arrange_legend(figure: Any, legend: Any, resize: bool) -> None:
    """Wraps the labels of a legend. If there are many, each has one line, and the figure becomes higher."""
    title, texts = legend.get_title(), legend.get_texts()
    title.set_text(_wrapped(title.get_text(), title.get_fontsize(), _LEGEND, 3))
    step = _LINE * texts[0].get_fontsize() / 72  # in inches
    most = min(max(int(figure.get_figheight() / step / (len(texts) + 2)), 1), 3)
    labels = distinct([text.get_text() for text in texts], lambda text: _wrapped(text, 10, _LEGEND, most))
    for text, label in zip(texts, labels, strict=True):
        text.set_text(_wrapped(label, text.get_fontsize(), _LEGEND, most))
    if resize:
        lines = sum(text.get_text().count("\n") + 1.5 for text in (title, *texts))
        figure.set_figheight(min(max(figure.get_figheight(), lines * step), _LARGEST))


def _arrange_categories(axes: Any, categories: Sequence[str], resize: bool) -> None:
    """Wraps the labels of an axis, or rotates them if they do not fit next to each other."""
    size, count, figure = axes.xaxis.label.get_fontsize(), len(categories), axes.figure
    room = _points(axes)[0] / count - size
    if all(_MEASURE.fits(label, room / size * _EM, 3) for label in categories):
        axes.set_xticks(range(count), [_wrapped(label, size, room, 3) for label in categories])
        return
    if resize:
        narrow = max(count * _LINE * size - _points(axes)[0], 0)
        figure.set_figwidth(min(figure.get_figwidth() + narrow / 72 / _WIDTH, _LARGEST))
        figure.set_figheight(figure.get_figheight() + _ROTATED / 72)
    lines = _points(axes)[0] / count / (_LINE * size)
    most, step = min(max(int(lines), 1), 3), max(math.ceil(1 / lines - 0.01), 1)
    labels = distinct(categories, lambda label: _wrapped(label, size, _ROTATED, most))
    # If the figure has no space for all labels, some ticks have none.
    shown = [_wrapped(label, size, _ROTATED, most) if i % step == 0 else "" for i, label in enumerate(labels)]
    axes.set_xticks(range(count), shown, rotation=90)


def _points(axes: Any) -> tuple[float, float]:
    """Estimates the width and height of the plot without labels and legend, in points."""
    width, height = axes.figure.get_size_inches() * 72 * (_WIDTH, _HEIGHT)
    legend = axes.get_legend()
    if legend is None:
        return width, height
    texts = [line for text in legend.get_texts() for line in text.get_text().split("\n")]
    beside = max(map(_MEASURE.length, texts)) * legend.get_texts()[0].get_fontsize() / _EM + 30
    return max(width - beside, width / 4), height


def _wrapped(text: str, size: float, width: float, most: int) -> str:
    """Wraps a text at `width` points in a font size in points."""
    lines = _MEASURE.lines([Segment(text)], width / size * _EM, most)
    return "\n".join(piece.text for line in lines for piece in line)


def _families(texts: Sequence[str]) -> list[str]:
    """Makes the fonts for texts known to matplotlib, and returns their names."""
    from matplotlib import font_manager

    names = []
    for file in files(texts):
        if all(font.fname != str(file) for font in font_manager.fontManager.ttflist):
            font_manager.fontManager.addfont(file)
        names.append(font_manager.get_font(str(file)).family_name)
    return names
