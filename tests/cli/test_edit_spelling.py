"""Misspelt settings of edits get a suggestion, and words with colons, commas and equations are accepted."""

import pytest

from sega_jax.cli.concepts import format_edit, parse_edit
from sega_jax.method.guidance import Edit

SUGGESTIONS = [
    ("glasses:5", "glasses:scale=5"),
    ("-glasses:5", "-glasses:scale=5"),
    ("glasses: 5", "glasses:scale=5"),
    ("glasses=5", "glasses:scale=5"),
    ("glasses:scale", "glasses:scale=5"),
    ("glasses:warmup", "glasses:warmup=10"),
    ("glasses:cooldown", "glasses:cooldown=20"),
    ("glasses:momentum-scale", "glasses:momentum_scale=0.1"),
    ("glasses;scale=5", "glasses:scale=5"),
    ("glasses scale=5", "glasses:scale=5"),
    ("glasses, scale=5", "glasses:scale=5"),
    ("glasses:scale:5", "glasses:scale=5"),
    ("glasses:scale 5", "glasses:scale=5"),
    ("glasses,scale:5", "glasses:scale=5"),
    ("glasses:scle=5", "glasses:scale=5"),
    ("glasses;scle=5", "glasses:scale=5"),
    ("glasses:SCALE=5", "glasses:scale=5"),
    ("glasses:=5", "glasses:scale=5"),
    ("glasses:5,threshold=0.9", "glasses:scale=5,threshold=0.9"),
    ("glasses:scale=5;threshold=0.9", "glasses:scale=5,threshold=0.9"),
    ("glasses:scale=5:threshold=0.9", "glasses:scale=5,threshold=0.9"),
    ("glasses:scale=5 threshold=0.9", "glasses:scale=5,threshold=0.9"),
    ("curly hair scale=8, threshold=0.95", "'curly hair:scale=8,threshold=0.95'"),
    ('"glasses":scle=5', "'\"glasses\":scale=5'"),
]
WORDS = [
    *("a clock showing 10:30", "16:9", "aspect ratio 16:9", "Psalm 23:4", "score 3:1, 2:0", "time 9:05"),
    *("Star Wars: A New Hope", "2001: A Space Odyssey", "Mission: Impossible", "https://example.com"),
    *("portrait, 4k", "a photo, iso 100", "f/1.8, 50mm", "a, b, c", "a man: tall, 30 years old"),
    *("a sign that says weight: 5 kg", "hat: 50%", "smile :)", "glasses:", "scales: green"),
    *("a blackboard with E=mc2", "the equation x=5", "x = 5", "2+2=4", "shade=green"),
    *("(glasses:1.3)", "(red:1.3) hat"),
]


@pytest.mark.parametrize(("text", "suggestion"), SUGGESTIONS)
def test_misspelt_settings_get_a_suggestion(text, suggestion):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked below
        parse_edit(text)
    assert f"; did you mean {suggestion}?" in str(error.value)


@pytest.mark.parametrize("words", WORDS)
def test_words_are_accepted(words):
    assert parse_edit(words) == Edit(words)
    assert format_edit(Edit(words)) == words


@pytest.mark.parametrize("text", ["glasses:5", "Blade Runner: 2049", "glasses:0.5,8", "-glasses:scale", "board: E=mc2"])
def test_the_message_says_how_to_quote_words(text):
    with pytest.raises(ValueError, match=r"write it in quotation marks: --edit '-?\"") as error:
        parse_edit(text)
    quoted = str(error.value).rpartition("--edit ")[2].strip("'")
    sign = -1 if text.startswith("-") else 1
    assert parse_edit(quoted) == Edit(text.removeprefix("-"), scale=sign * Edit("").scale)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scale=5", "there is no concept"),
        (":5", "there is no concept"),
        ("glasses:0.5,8", "write settings as in glasses:scale=5. The settings are scale, threshold"),
        ("glasses:steps=5", "'steps' is unknown; write settings as in"),
        ("glasses:warmup=1e20", "warmup='1e20' should be a whole number from 0 to 2147483647"),
        ("glasses:warmup=2.5", "warmup='2.5' should be a whole number from 0 to 2147483647"),
        ("glasses:warmup=-5", "warmup=-5 should be from 0 to 2147483647"),
        (f"glasses:warmup={10**30}", f"warmup={10**30} should be from 0 to 2147483647"),
        ("glasses:scale=nan", "scale=nan should be a finite number"),
        ("glasses:scale=1e400", "scale=inf should be a finite number"),
        ("glasses:scale=", "scale='' should be a number"),
        ("glasses:momentum_scale=2", "momentum_scale=2.0 should be a number in [0, 1]; leave it out"),
    ],
)
def test_unsuitable_settings_are_explained(text, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked below
        parse_edit(text)
    assert str(error.value).startswith("--edit ")
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["–glasses", "−glasses", "—glasses:scale=5", "--glasses"])
def test_dashes_that_look_like_a_minus_get_a_suggestion(text):
    with pytest.raises(ValueError, match="did you mean -glasses"):
        parse_edit(text)


@pytest.mark.parametrize("text", ["\n", "\t", "\N{NO-BREAK SPACE}", " : ", "-\n"])
def test_white_space_is_no_concept(text):
    with pytest.raises(ValueError, match="there is no concept"):
        parse_edit(text)


def test_long_texts_are_concepts():
    words = f"a{' ' * 50_000}b"
    assert parse_edit(words).concept == words
