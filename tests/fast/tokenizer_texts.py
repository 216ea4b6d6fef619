"""Texts of many scripts and kinds for tokenizers, the same every time."""

import random
import unicodedata

BLOCKS = (
    (0x20, 0x7E),
    (0xA1, 0x24F),
    (0x300, 0x36F),
    (0x386, 0x3FF),
    (0x400, 0x4FF),
    (0x5D0, 0x5EA),
    (0x620, 0x64A),
    (0x904, 0x939),
    (0xE01, 0xE3A),
    (0x10D0, 0x10FA),
    (0x1100, 0x1112),
    (0x1200, 0x1248),
    (0x1780, 0x17B3),
    (0x1F00, 0x1FFE),
    (0x2000, 0x206F),
    (0x2200, 0x22FF),
    (0x3041, 0x30FE),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0xFF01, 0xFFEE),
    (0x10330, 0x1034A),
    (0x1D400, 0x1D454),
    (0x1F300, 0x1F6FF),
    (0, 0x1F),
)
GLUE = (
    *("", " ", "  ", "     ", "\n", "\n\n\n", "\t\t", "\r\n", "\u00a0", "\u200d", "\u0301", "\ufeff"),
    *(
        ", ",
        "12",
        "0071234 ",
        "'s ",
        "'LL",
        "_",
        "....",
        "======",
        "</",
        "s>",
        "<|im_",
        "\N{FAMILY}\u200d\N{BOY}",
    ),
    *(
        "for (int i = 0; i < n; ++i) {\n",
        "\x7f",
        "a" * 40,
        "é" * 9,
        "\N{WAVING BLACK FLAG}\U000e0067\U000e007f",
    ),
)


def many_scripts(count: int, seed: int = 7) -> list[str]:
    """Strings of one to eight words, each of one script or kind, with all sorts of things between them."""
    rng = random.Random(seed)
    return ["".join(_words(rng)) for _ in range(count)]


def _words(rng: random.Random) -> list[str]:
    words = []
    for _ in range(rng.randint(1, 8)):
        low, high = rng.choice(BLOCKS)
        characters = (chr(rng.randint(low, high)) for _ in range(rng.randint(0, 8)))
        words.append("".join(each for each in characters if unicodedata.category(each) != "Cn"))
        words.append(rng.choice(GLUE))
    return words
