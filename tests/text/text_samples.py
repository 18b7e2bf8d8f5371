"""Texts that tokenizers get wrong, and every Unicode character."""

SPELT = [
    "<|eot_id|>", "a<|begin_of_text|>b", "</s>", "<s>", "<unk>", " </s> ", "[INST]", "<0x41>",
    "<0x0A><0xE4>", "<|reserved_special_token_5|>",
]  # fmt: skip
CHINESE = (
    "语言模型把文字切成词元，再把词元变成数字。今天天气很好，我们去公园散步吧！“你叫什么名字？”她笑着问。"
    "北京大学成立于1898年；混合English单词、数字3.14与标点……"
)
NASTY = [
    "", " ", "  ", "   a", " a", "a ", "a  b", "\n", "\r\n", "\r\n\t x\r", "\t\t\n \n  \n", "\0",
    "a\0b\x01\x1f\x7f\x85", "\u00a0\u2003 \u3000x", "it's WE'LL i'M 'x '", "12345678901234567890",
    "é 世界 🎉", "e\u0301\u0300", "👩‍👩‍👧‍👦👍🏽🇧🇷", "\u202eabc\u200f\u200eאבגד عربي", "ǅ Ⅷ ²½ ०१२",
    "\ud7ff\ue000\uf8ff\ufffd\ufffe\uffff\U00010000\U0010ffff", "\ufeffbom", "zalgo h̷̛̗e̸",
    "// ---- \n#include <x>\n\n\n\treturn;  \n", "ab" * 5_000, "x=1;" * 5_000, CHINESE,
    CHINESE.replace("。", "") * 50, *SPELT,
]  # fmt: skip
LONG = [letter * 100_000 for letter in (" ", "a", "\n", "-", "é", "世", " \n")]
# Every Unicode scalar value but U+2581.
UNICODE = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and c != 0x2581]
