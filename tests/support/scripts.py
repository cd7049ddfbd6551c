"""Texts in several scripts."""

# Texts that the extra `fonts` has to draw.
TEXTS = {
    "accents": "café Zürich Việt",
    "cyrillic": "Портрет, 25 лет",
    "greek": "Γάτα",
    "chinese": "一只猫的肖像。",
    "japanese": "猫の「かわいい」メガネ",
    "korean": "고양이의 초상화",
    "arabic": "صورة لقطة (25)",
    "hebrew": "תמונה של חתול",
    "hindi": "एक बिल्ली का चित्र",
    "thai": "ภาพเหมือนของแมว",
    "emoji": "😀👩🏽‍🚀👨‍👩‍👧❤️🇩🇪1️⃣",
}
