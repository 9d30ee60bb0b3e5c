"""Texts on which tokenizers differ: digits, blanks, code, tables, emoji, scripts."""

TEXTS = [
    "\n\n1. a",
    "Steps:\n1. one\n2. two\n\n10. ten\n  11. eleven",
    "in 2024, 1234567 people paid $3.50 (12%) at 10:45",
    "x = 12\n    y = 345\n\t\tz = 6   # 7\n",
    "a  12\n34   56",
    "   three blanks  before\n\n\n   and after   ",
    "def f(a, b=1):\n    if a>=b and not a!=0:\n        return a**2 // b  # it's 'ok'\n\n\n\tpass\n",
    'for (int i=0;i<10;++i) { s += v[i]; } /* C */ <a href="x">',
    "| name | n |\n|------|--:|\n| ab   | 12 |\n| c    | 3456 |\n",
    "I'll, we've, they're, IT'S, don'T, o'clock 'quoted' \"double\"",
    "camelCase HTTPServer snake_case UPPER lower Mixed3D v2.0",
    "tabs\there\r\nwindows lines\r\n\r\n12\r\n",
    "...!!!??? --- *** ~~ ## $$ ^^ `code` @home #1 & <tag/> [x] {y}",
    "🙂 two 🙂🙂 and 👩‍💻, 🇩🇪 ok ✅ 100 ½ ² Ⅷ",
    "Ça va très bien, naïve façade, Übergröße, Žluťoučký kůň, año, ø",
    "Привет, мир! Как дела 12 раз? Съешь ещё этих булок.",
    "مرحبا بالعالم 12 و ٣٤ كيف الحال؟",
    "你好，世界！今天是2024年1月5日。日本語のテキスト、ひらがなとカタカナ。한국어 문장 12개",
    "mixed 中文and English12混合 текст",
    "a\u00a0b\u2003c",
    "",
    " ",
    "\n",
    "\n \n  \n1",
    "00 000 0000 00000",
]

MARKS = ["สวัสดีชาวโลก วันที่ 12", "नमस्ते दुनिया", "שָׁלוֹם עוֹלָם"]
"""With combining marks."""
CAPITALS = ["мойДом одинДваТри"]
"""Capitals beyond A to Z inside of words."""
DECOMPOSED = ["e\u0301te\u0301 A\u030angstro\u0308m"]
"""Letters with separate accents."""
WIDE_BLANK = ["a\u3000d b\u3000d,c\u3000d"]
