"""The shipped model: what it claims, held against transformers and against drawings it has never seen."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

import seavlm
from seavlm.data.pictures import HELD_OUT, load_pictures
from seavlm.data.tasks import make_samples
from seavlm.engine.vlm import VLM
from seavlm.evals.metrics import Vocabulary, judge
from seavlm.evals.tasks import RANKED, Question, question_of, with_ranked
from seavlm.text.language import LANGUAGES
from seavlm.weights.refs import resolve

QUESTION = {
    "my": "ဒါဘာလဲ။", "en": "What is this?", "id": "Ini gambar apa?", "km": "តើនេះជាអ្វី?", "lo": "ນີ້ແມ່ນຫຍັງ?",
    "ms": "Apakah ini?", "zh": "这是什么？", "tl": "Ano ito?", "ta": "இது என்ன?", "th": "นี่คืออะไร",
    "vi": "Đây là gì?",
}  # fmt: skip
GROUPS = ["animals-nature", "food-drink", "clothing", "musical-instrument"]


@pytest.fixture(scope="module")
def nano() -> VLM:
    return seavlm.load("nano", dtype="float32")


def drawing(key: str) -> Image.Image:
    return Image.open(io.BytesIO(load_pictures().image_bytes(key, HELD_OUT))).convert("RGB")


def asked(picture: Image.Image | None, question: str) -> list[dict]:
    content = [{"type": "image", "image": picture}] if picture else []
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def test_transformers_gives_the_same_answers(nano: VLM) -> None:
    """Pictures and text in all 11 languages, greedy: equal token for token."""
    import transformers

    folder = resolve("nano")
    processor = transformers.AutoProcessor.from_pretrained(folder)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    concepts = load_pictures().select(GROUPS)[:: 230 // len(LANGUAGES)]
    for (code, question), concept in zip(QUESTION.items(), concepts, strict=False):
        for picture in (drawing(concept.key), None):
            messages = asked(picture, question)
            batch = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            with torch.no_grad():
                out = theirs.generate(**batch, max_new_tokens=16, do_sample=False)
            wanted = processor.tokenizer.decode(
                out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True
            )
            reply = nano.generate(messages, max_new_tokens=16, temperature=0)
            assert reply.text.strip() == wanted.strip(), (code, concept.names["en"])


def questions_for_nano(task: str, each: int) -> list[Question]:
    """The first `each` questions of the held-out art, in every language."""
    rows = make_samples(
        load_pictures(), split="eval", tasks={task: 1}, languages=list(LANGUAGES), families=[HELD_OUT],
        concepts=GROUPS, n=each * len(LANGUAGES), seed=0,
    )  # fmt: skip
    return [question_of(row) for row in rows]


def shares(questions: list[Question], replies: list[str]) -> dict[str, float]:
    """Right answers by language."""
    vocabulary = Vocabulary.of(questions)
    right: dict[str, list[bool]] = {code: [] for code in LANGUAGES}
    for question, reply in zip(questions, replies, strict=True):
        right[question.language].append(judge(question, reply, vocabulary).verdict == "correct")
    return {code: sum(found) / len(found) for code, found in right.items()}


@pytest.mark.parametrize(
    ("task", "mean", "least"), [("name", 0.5, 0.35), ("choose", 0.6, 0.45), ("flag", 0.6, 0.3)]
)
def test_it_knows_drawings_it_has_never_seen(nano: VLM, task: str, mean: float, least: float) -> None:
    """A part of the card's evaluation, which has all of it: well above chance in each of the 11 languages."""
    questions = questions_for_nano(task, 30)
    replies = nano.generate_batch([q.messages for q in questions], max_new_tokens=24, temperature=0)
    right = shares(questions, [reply.text for reply in replies])
    assert sum(right.values()) / len(right) > mean, right
    assert min(right.values()) > least, right


def test_it_picks_one_of_four(nano: VLM) -> None:
    """As a classifier would: of four names, the one it finds likeliest for the picture."""
    questions = [q for q in with_ranked(questions_for_nano("choose", 30)) if q.task == RANKED]
    ranked = nano.rank_batch([q.messages for q in questions], [q.options for q in questions])
    picked = [q.options[chances.index(max(chances))] for q, chances in zip(questions, ranked, strict=True)]
    right = shares(questions, picked)
    assert sum(right.values()) / len(right) > 0.85, right
    assert min(right.values()) > 0.7, right


def test_it_answers_in_the_language_of_the_question(nano: VLM) -> None:
    from seavlm.text.language import plausible_languages

    picture = drawing("1f418")  # an elephant
    for code in LANGUAGES:
        reply = nano.generate(asked(picture, QUESTION[code]), max_new_tokens=24, temperature=0)
        assert code in plausible_languages(reply.text), (code, reply.text)
