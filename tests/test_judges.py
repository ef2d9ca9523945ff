"""Judges that are models: small random ones with the libraries' own classes, held against computations of our own."""

import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from immunize.config import build, load
from immunize.judges import coherence
from immunize.judges.classifier import SequenceClassifier
from immunize.judges.guard import Guard
from immunize.judges.judge import Answered, Conversation, ModelJudge, Session
from immunize.judges.kept import FOLDER, KeptJudge, kept
from immunize.judges.strong_reject import FineTuned
from immunize.judges.weights import Weights
from immunize.judges.zoo import Zoo
from immunize.scoring import outcome_of
from immunize.sharing.pack import pack
from immunize.stages import address, identity
from immunize.types import Example, Outcome
from tests.shared import share

ANSWERS = ("the apple", "i am sorry , the other answers are plums and more plums", "plums", "an answer")
CONVERSATIONS = [Conversation(prompt=f"what is {number} ?", answer=text) for number, text in enumerate(ANSWERS)]
LABELS = {0: "harm", 1: "insult", 2: "fine"}


def example(prompt: str) -> Example:
    return Example(id=prompt, prompt=prompt, answer="a", object=prompt, category="c")


def scores(judge: ModelJudge, asked: Sequence[Conversation] = CONVERSATIONS) -> list[float]:
    return [item.harmfulness for item in judge.open(device="cpu").ask(asked)]


@pytest.fixture(scope="module")
def classifier_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = BertConfig(
        vocab_size=320,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id,
        id2label=LABELS,
        label2id={name: number for number, name in LABELS.items()},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def causal_folder(make_chat: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("causal")
    make_chat(seed=3).save(folder)
    return folder


def classifier(folder: Path, **more: Any) -> SequenceClassifier:
    given: dict[str, Any] = {"form": "single_label", "harmful": ("harm",), "template": "Q: {prompt} A: {answer}"}
    return SequenceClassifier(name="classifier", model=Weights(path=str(folder)), batch_size=3, **(given | more))


def logits_one_by_one(folder: Path) -> torch.Tensor:
    """Every text alone, without padding: (conversations, labels)."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    network = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [f"Q: {item.prompt} A: {item.answer}" for item in CONVERSATIONS]
    with torch.no_grad():
        rows = [network(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0] for text in texts]
    return torch.stack(rows)


def test_one_label_of_several_is_its_share_of_the_softmax(classifier_folder: Path) -> None:
    exponents = logits_one_by_one(classifier_folder).exp()
    shares = exponents / exponents.sum(1, keepdim=True)
    assert shares[:, 0].max() - shares[:, 0].min() > 0.01, "the model must tell the texts apart"
    assert scores(classifier(classifier_folder)) == pytest.approx(shares[:, 0].tolist(), abs=1e-5)
    both = classifier(classifier_folder, harmful=("insult", "harm"))
    assert scores(both) == pytest.approx((1 - shares[:, 2]).tolist(), abs=1e-5)


def test_several_labels_at_once_are_sigmoids_of_which_the_largest_counts(classifier_folder: Path) -> None:
    sigmoids = 1 / (1 + (-logits_one_by_one(classifier_folder)).exp())
    largest = sigmoids[:, :2].max(1).values
    found = scores(classifier(classifier_folder, form="multi_label", harmful=("harm", "insult")))
    assert found == pytest.approx(largest.tolist(), abs=1e-5)
    middle = float(largest.sort().values[1:3].mean())
    by_threshold = classifier(classifier_folder, form="multi_label", harmful=("harm", "insult"), threshold=middle)
    assert scores(by_threshold) == [float(value > middle) for value in largest.tolist()]
    assert sum(scores(by_threshold)) == 2
    of_all = scores(classifier(classifier_folder, form="multi_label", harmful=()))
    assert of_all == pytest.approx(sigmoids.max(1).values.tolist(), abs=1e-5)


def test_a_classifier_whose_numbers_are_broken_gives_missing(classifier_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    network = AutoModelForSequenceClassification.from_pretrained(classifier_folder)
    network.classifier.bias.data[:] = math.nan
    network.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(classifier_folder).save_pretrained(tmp_path)
    for more in ({}, {"form": "multi_label", "threshold": 0.5}, {"form": "multi_label"}):
        assert all(map(math.isnan, scores(classifier(tmp_path, **more))))


def test_what_a_classifier_cannot_do_is_named(classifier_folder: Path) -> None:
    with pytest.raises(ValueError, match="no such label; there are harm, insult, fine"):
        scores(classifier(classifier_folder, harmful=("harmful",)))
    with pytest.raises(ValueError, match="name the harmful ones"):
        classifier(classifier_folder, harmful=())
    with pytest.raises(ValueError, match="threshold"):
        classifier(classifier_folder, threshold=0.5)
    for template in ("{prompt}", "{answer} {category}", "{answer} {"):
        with pytest.raises(ValueError, match="template"):
            classifier(classifier_folder, template=template)


def test_a_model_that_is_no_classifier_is_refused_and_given_no_random_head(causal_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks the weights score\.weight of LlamaForSequenceClassification"):
        scores(classifier(causal_folder, harmful=("LABEL_0",)))


def chance_of(folder: Path, ids: Sequence[int], word: Sequence[int]) -> float:
    """The product of the chances of the tokens of a word, each from its own forward pass."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    chance = 1.0
    for position, token in enumerate(word):
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([[*ids, *word[:position]]])).logits[0, -1]
        chance *= float(logits.double().softmax(-1)[token])
    return chance


def test_a_guards_verdict_is_the_share_of_unsafe_in_its_two_words(causal_folder: Path, tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    unsafe, safe = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("unsafe", "safe"))
    assert len(unsafe) > 1, "the words must be of several tokens here"
    expected = []
    for item in CONVERSATIONS:
        text = f"<user>{item.prompt}<assistant>{item.answer}<end>\n<assistant>"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        first, second = chance_of(causal_folder, ids, unsafe), chance_of(causal_folder, ids, safe)
        expected.append(first / (first + second))
    judge = Guard(name="guard", model=Weights(path=str(causal_folder)), least_mass=0.0, batch_size=3)
    assert scores(judge) == pytest.approx(expected, rel=1e-3)
    one_token = Guard(name="guard", model=Weights(path=str(causal_folder)), unsafe="u", safe="s", least_mass=0.0)
    assert scores(one_token) != pytest.approx(expected, rel=1e-3)


def test_a_guard_that_would_say_something_else_gives_missing(causal_folder: Path) -> None:
    judge = Guard(name="guard", model=Weights(path=str(causal_folder)))
    assert all(map(math.isnan, scores(judge)))


def test_the_fine_tuned_grader_gives_the_expected_digit(causal_folder: Path, tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    digits = [tokenizer(digit, add_special_tokens=False)["input_ids"] for digit in "12345"]
    expected = []
    for item in CONVERSATIONS:
        ids = tokenizer(f"{item.prompt} | {item.answer} | ")["input_ids"]
        chances = [chance_of(causal_folder, ids, digit) for digit in digits]
        mean = sum(number * chance for number, chance in enumerate(chances, start=1)) / sum(chances)
        expected.append((mean - 1) / 4)

    def judge(**more: Any) -> FineTuned:
        model = Weights(path=str(causal_folder))
        return FineTuned(name="graded", model=model, template="{prompt} | {answer} | ", batch_size=3, **more)

    assert scores(judge(least_mass=0.0)) == pytest.approx(expected, rel=1e-3)
    assert max(expected) - min(expected) > 0.01
    assert all(map(math.isnan, scores(judge(least_mass=0.9))))
    short = judge(least_mass=0.0, max_answer_tokens=1)
    begins_alike = [Conversation(prompt="what ?", answer=text) for text in ("xa", "xb and much more")]
    cut, whole = (scores(grader, begins_alike) for grader in (short, judge(least_mass=0.0)))
    assert cut[0] == pytest.approx(cut[1], abs=1e-6)
    assert whole[0] != pytest.approx(whole[1], abs=1e-6)


def test_what_is_too_long_is_missing_for_a_guard_and_cut_for_a_classifier(
    causal_folder: Path, classifier_folder: Path
) -> None:
    """Both models read 128 tokens; the conversation has more."""
    asked = [*CONVERSATIONS[:2], Conversation(prompt="what ?", answer="plums and apples " * 80)]
    judge = Guard(name="guard", model=Weights(path=str(causal_folder)), least_mass=0.0)
    *known, long = scores(judge, asked)
    assert known == pytest.approx(scores(judge, CONVERSATIONS[:2]), abs=1e-5)
    assert math.isnan(long)
    longer = Conversation(prompt="what ?", answer="plums and apples " * 80 + "sorry")
    cut, again = scores(classifier(classifier_folder), [asked[2], longer])
    assert 0 < cut == pytest.approx(again, abs=1e-6)


@dataclass(frozen=True, kw_only=True)
class Counting(ModelJudge):
    """Counts in a file what it is asked; the length of the answer, modulo 10, is the score, and "fail" fails."""

    log: str
    offset: float = 0.0

    def open(self, *, device: str) -> Session:
        return CountingSession(judge=self)


@dataclass(frozen=True, kw_only=True)
class CountingSession:
    judge: Counting

    def ask(self, conversations: Sequence[Conversation]) -> list[Answered]:
        with Path(self.judge.log).open("a") as log:
            log.writelines(f"{item.prompt}/{item.answer}\n" for item in conversations)
        return [
            Answered(
                harmfulness=math.nan if item.answer == "fail" else len(item.answer) % 10 / 10 + self.judge.offset,
                model="m",
            )
            for item in conversations
        ]


def test_what_was_asked_once_is_not_asked_again_but_for_what_failed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    judge = Counting(name="counting", log=str(log))
    asked = [example("p"), example("p"), example("q"), example("p")]
    for _ in range(2):
        found = kept(judge, stages=tmp_path, device="cpu").measure(asked, ["one", "one", "one", "fail"])["harmfulness"]
        assert found[:3] == [0.3, 0.3, 0.3]
        assert math.isnan(found[3])
    assert sorted(log.read_text().split()) == ["p/fail", "p/fail", "p/one", "q/one"]
    renamed = kept(Counting(name="renamed", log=str(log)), stages=tmp_path, device="cpu")
    assert (renamed.name, renamed.measure(asked[:1], ["one"])) == ("renamed", {"harmfulness": [0.3]})
    assert len(log.read_text().split()) == 4, "another name is no other judge"
    other = Counting(name="counting", log=str(log), offset=0.1)
    assert kept(other, stages=tmp_path, device="cpu").measure(asked[:1], ["one"]) == {"harmfulness": [0.4]}
    files = list((tmp_path / FOLDER).iterdir())
    assert len(files) == 2
    assert not any(b"one" in path.read_bytes() for path in files), "no text is kept"


def test_two_workers_share_one_file_and_go_by_the_same_score(tmp_path: Path) -> None:
    asked = [example(f"p{number}") for number in range(40)]
    judge = Counting(name="counting", log=str(tmp_path / "log"))

    def work(_: int) -> list[float]:
        return kept(judge, stages=tmp_path, device="cpu").measure(asked, ["four"] * 40)["harmfulness"]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(8))) == [[0.4] * 40] * 8


def test_a_judge_without_a_model_is_left_alone(tmp_path: Path) -> None:
    from immunize.judges.keyword import KeywordRefusal

    judge = KeywordRefusal()
    assert kept(judge, stages=tmp_path, device="cpu") is judge
    counting = kept(Counting(name="counting", log="log"), stages=tmp_path, device="cpu")
    assert isinstance(counting, KeptJudge)
    assert not (tmp_path / FOLDER).exists(), "nothing is opened before the first question"


def test_a_judges_model_is_known_by_its_content_or_its_commit(causal_folder: Path, tmp_path: Path) -> None:
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(causal_folder, moved)
    here, there = (address(identity(Weights(path=str(path)))) for path in (causal_folder, moved))
    assert here == there
    (moved / "tokenizer_config.json").write_text("{}")
    assert address(identity(Weights(path=str(moved)))) != here
    commit = "0" * 40
    assert identity(Weights(id="a/b", commit=commit)) != identity(Weights(id="a/c", commit=commit))
    for given in ({}, {"path": str(moved), "commit": commit}, {"id": "a/b", "commit": "main"}, {"path": str(tmp_path)}):
        with pytest.raises(ValueError):
            Weights(**given)


def test_a_missing_score_leaves_the_check_undetermined_and_its_means_missing(
    sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny guard is unsure of every answer; nothing is filled in for it, from the stage to the verdict."""
    import immunize
    from tests.tiny import tiny

    monkeypatch.setattr(coherence, "LENGTH_FACTOR", 1e6)  # else the tiny model's answers are all broken
    model, _ = sources
    place = (f"judge.guard.model.path={model}", "judge.guard.model.commit=null", "judge.guard.model.dtype=float32")
    run = immunize.run([*tiny(sources, tmp_path), "judge=guard", *place])
    judged = [score for score in run.scores if score.judge == "guard"]
    assert judged
    assert all(math.isnan(value) for score in judged for value in score.scores)
    means = [row for row in run.rows if row.metric.startswith("guard/")]
    assert {row.metric for row in means} > {"guard/harmfulness", "guard/refused"}
    assert all(math.isnan(row.value) for row in means)
    assert {check.verdict for check in run.checks} == {"undetermined"}
    kept = immunize.run([*tiny(sources, tmp_path), "judge=guard", *place])  # read back from its records
    for score in (*judged, *(score for score in kept.scores if score.judge == "guard")):
        assert set(score.outcomes) <= {None, Outcome.BROKEN}, "nothing can be said of an answer that was not judged"
    assert any(None in score.outcomes for score in judged)
    frame = immunize.load_study(run.path.parent).scores
    assert frame["outcome"].isna().any() and not frame["outcome"].isin(["refused", "None"]).any()
    archive = pack(run.path.parent, output=tmp_path / "packed.tar.gz").path
    assert share("verify", archive) == 0


def test_an_answer_is_what_its_score_says_if_it_has_one() -> None:
    assert [outcome_of(value, False) for value in (0.0, 0.5, math.nan)] == ["refused", "harmful", None]
    assert {outcome_of(value, True) for value in (0.0, 0.5, math.nan)} == {"broken"}


@pytest.mark.parametrize("choice", ["classifier", "beaver_dam", "guard", "strong_reject_finetuned"])
def test_shipped_choices_need_a_commit_and_build_with_one(choice: str) -> None:
    more = [f"judge.{choice}.template='{{prompt}}{{answer}}'"] if choice == "strong_reject_finetuned" else []
    with pytest.raises(ValueError, match=rf"judge.{choice}.model.commit.*/commits/main lists them; or a folder: path="):
        build(load([f"judge={choice}", *more]))
    cell = build(load([f"judge={choice}", f"judge.{choice}.model.commit={'a' * 40}", *more]))
    assert cell.judge[choice].name == choice


def test_a_judge_of_the_zoo_needs_the_library() -> None:
    if "judgezoo" in sys.modules:
        pytest.skip("judgezoo is there")
    with pytest.raises(ValueError, match=r"pip install 'immunize\[judgezoo\]'"):
        build(load(["judge=zoo", "judge.zoo.judge=harmbench"]))


STAND_IN = '''
class Judge:
    """The documented interface of judgezoo alone: no judge of it is here."""

    @classmethod
    def from_name(cls, name):
        assert name == "harmbench"
        return cls()

    def __call__(self, chats):
        assert [turn["role"] for turn in chats[0]] == ["user", "assistant"]
        known = {"bad": 0.75, "none": None, "out": 7.0}
        return {"p_harmful": [known[chat[1]["content"]] for chat in chats]}
'''


def test_the_adapter_speaks_the_documented_interface_of_the_zoo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "judgezoo.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    session = Zoo(name="zoo", judge="harmbench").open(device="cpu")
    found = session.ask([Conversation(prompt="p", answer=text) for text in ("bad", "none", "out")])
    assert found[0] == Answered(harmfulness=0.75)
    assert all(math.isnan(item.harmfulness) for item in found[1:])
    monkeypatch.delitem(sys.modules, "judgezoo")
