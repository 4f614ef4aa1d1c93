"""Word overlap: token F1 in English and Chinese, ROUGE-L."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache

import jieba
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

__all__ = ["f1", "f1_zh", "rouge_l", "rouge_l_zh"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CHINESE_SIGNS = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】"
    "〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_SIGNS = str.maketrans("", "", string.punctuation)
_ALL_SIGNS = str.maketrans("", "", string.punctuation + _CHINESE_SIGNS)


def f1(prediction: str, answer: str) -> float:
    """Return the F1 of words, lower case, without punctuation and articles (SQuAD, LongBench)."""
    return _f1_of_words(_words(prediction), _words(answer))


def f1_zh(prediction: str, answer: str) -> float:
    """Return the F1 of jieba's words without punctuation (LongBench)."""
    return _f1_of_words(_chinese_words(prediction), _chinese_words(answer))


def rouge_l(prediction: str, answer: str) -> float:
    """Return the F-measure of ROUGE-L, rouge-score's own tokens, no stemming.

    One longest common subsequence of the whole texts. LongBench's figures come from the package
    ``rouge``, which scores at summary level, over sentences split at full stops: its figures are
    others, and do not compare with these.
    """
    return _rouge(prediction, answer, RougeScorer(["rougeL"]))


def rouge_l_zh(prediction: str, answer: str) -> float:
    """Return the F-measure of ROUGE-L over jieba's words (LongBench)."""
    return _rouge(prediction, answer, RougeScorer(["rougeL"], tokenizer=_Jieba()))


def _rouge(prediction: str, answer: str, scorer: RougeScorer) -> float:
    return float(scorer.score(answer, prediction)["rougeL"].fmeasure)


class _Jieba(Tokenizer):
    def tokenize(self, text: str) -> list[str]:
        return [word for word in _segmenter().lcut(text) if word.strip()]


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_SIGNS)).split()


def _chinese_words(text: str) -> list[str]:
    words = (
        "".join(word.lower().translate(_ALL_SIGNS).split()) for word in _segmenter().lcut(text)
    )
    return [word for word in words if word]


def _f1_of_words(prediction: Sequence[str], answer: Sequence[str]) -> float:
    shared = sum((Counter(prediction) & Counter(answer)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(prediction), shared / len(answer)
    return 2 * precision * recall / (precision + recall)


@cache
def _segmenter() -> "jieba.Tokenizer":
    # the package's own one prints how long its dictionary took to load
    jieba.setLogLevel(60)
    return jieba.Tokenizer()
