"""Instructions made of raw data sets: templates, rows of the hub and in plain form, and the step data from end to end."""

import json
import re
from types import SimpleNamespace

import pytest
from conftest import call_main, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json
from expert_merging.hemoe import instructions, raw_tasks, templates
from expert_merging.hemoe.examples import read_examples
from expert_merging.hemoe.templates import Case

SCRIPT = "neighbours/HEMoE_moe_construction.py"
LETTERED = {"text": ["iron", "wood", "wool"], "label": ["A", "B", "C"]}

# A row of each data set in the hub's columns, written for this test, and the answer that it has.
ROWS = {
    "anli": ({"uid": "1", "premise": "It rained all day.", "hypothesis": "It was dry.", "label": 2, "reason": ""}, "no"),
    "arc_challenge": ({"id": "1", "question": "What conducts?", "choices": LETTERED, "answerKey": "A"}, "iron"),
    "arc_easy": (
        {"id": "1", "question": "What burns?", "choices": {**LETTERED, "label": ["1", "2", "3"]}, "answerKey": "2"},
        "wood",
    ),
    "boolq": ({"question": "is ice cold", "passage": "Ice is cold water.", "idx": 0, "label": 1}, "yes"),
    "cb": (
        {"premise": "She may sing.", "hypothesis": "She sings.", "idx": 0, "label": 2},
        "it is not possible to tell",
    ),
    "cola": ({"sentence": "Him slept.", "label": 0, "idx": 0}, "no"),
    "copa": (
        {"premise": "The cup fell.", "choice1": "It broke.", "choice2": "It sang.", "question": "effect", "label": 0},
        "It broke.",
    ),
    "gsm8k": ({"question": "What are 2 and 3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}, "2+3=<<2+3=5>>5\n#### 5"),
    "hellaswag": (
        {"ctx": "How to sweep [title] Take a broom.", "endings": ["[step] Eat it.", "Move it.", "Fly."], "label": "1"},
        "Move it.",
    ),
    "logiqa": (
        {"label": "b", "context": "All A are B.", "question": "Which follows?", "options": ["No A is B", "Some B are A"]},
        "Some B are A",
    ),
    "mnli": ({"premise": "A dog runs.", "hypothesis": "An animal runs.", "label": 0, "idx": 0}, "yes"),
    "mrpc": ({"sentence1": "He left.", "sentence2": "He went away.", "label": 1, "idx": 0}, "yes"),
    "multirc": (
        {"paragraph": "Ann has a cat.", "question": "Who has a cat?", "answer": "Bob", "idx": {}, "label": 0},
        "no",
    ),
    "openbookqa": ({"id": "1", "question_stem": "Sheep give us", "choices": LETTERED, "answerKey": "C"}, "wool"),
    "piqa": ({"goal": "Cut bread.", "sol1": "Use a spoon.", "sol2": "Use a knife.", "label": 1}, "Use a knife."),
    "qnli": ({"question": "Who wrote it?", "sentence": "Ann wrote it.", "label": 0, "idx": 0}, "yes"),
    "qqp": ({"question1": "How tall is it?", "question2": "How old is it?", "label": 0, "idx": 0}, "no"),
    "record": (
        {
            "passage": "Ann met Bob in Rome.\n@highlight\nThey talked",
            "query": "It was in @placeholder that they met",
            "entities": ["Ann", "Rome", "Bob", "Rome"],
            "answers": ["Rome"],
        },
        "Rome",
    ),
    "rte": ({"sentence1": "Ann sold a car.", "sentence2": "Ann bought a car.", "label": 1, "idx": 0}, "no"),
    "sciq": (
        {"question": "What do plants make?", "support": "Plants make sugar.", "correct_answer": "sugar"}
        | {"distractor1": "salt", "distractor2": "sand", "distractor3": "steel"},
        "sugar",
    ),
    "siqa": (
        {"context": "Ann fell.", "question": "How does Ann feel?", "answerA": "glad", "answerB": "hurt", "answerC": "new"}
        | {"label": "2"},
        "hurt",
    ),
    "sst2": ({"sentence": "a joy", "label": 1, "idx": 0}, "positive"),
    "triviaqa": ({"question": "Capital of Italy?", "answer": {"value": "Rome", "aliases": ["Roma"]}}, "Rome"),
    "wic": (
        {"word": "bank", "sentence1": "A river bank.", "sentence2": "A bank lends.", "idx": {}, "label": 0},
        "no",
    ),
    "winogrande": (
        {"sentence": "Ann fed Eve because _ was hungry.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        "Eve",
    ),
    "wsc": ({"text": "Ann saw Eve and she ran.", "span1_text": "Ann", "span2_text": "she", "idx": 0, "label": 1}, "yes"),
    "mr": ({"text": "dull", "label": 0}, "negative"),
    "sst5": ({"text": "fine", "label": 3}, "positive"),
    "trec": ({"text": "Who was it?", "coarse_label": 3, "fine_label": 1}, "person"),
}  # fmt: skip
ROWS["social_iqa"] = ROWS["siqa"]


def case_of(task: str) -> Case:
    return raw_tasks.read_case(raw_tasks.known(task), ROWS[task][0], "here")


def test_the_papers_data_sets_are_all_there():
    assert set(ROWS) == set(raw_tasks.DATA_SETS)
    assert len(raw_tasks.PAPER) == 26
    assert {one.kind for one in raw_tasks.DATA_SETS.values()} == set(templates.TEMPLATES)


@pytest.mark.parametrize("task", sorted(ROWS))
def test_each_data_set_has_six_templates_and_each_is_filled(task):
    case, kind = case_of(task), raw_tasks.DATA_SETS[task].kind
    assert case.answer == ROWS[task][1]
    for with_options in (True, False):
        usable = templates.usable(kind, case, with_options)
        made = [templates.fill(template, case, with_options) for template in usable]
        assert len({one["instruction"] for one in made}) == len(usable) >= (6 if with_options else 5)
        for one in made:
            assert not re.search(r"[{}]|  | \n|\n\n\n", one["instruction"])
            assert one["output"].startswith(case.answer)
            assert ("OPTIONS:" in one["instruction"]) == bool(with_options and case.choices)
            assert (f") {one['output']}" in one["instruction"]) == bool(with_options and case.choices)


def test_by_hand():
    case = case_of("winogrande")
    go_on, _, _, where, *_ = templates.TEMPLATES["blank"]
    assert templates.fill(go_on, case, False) == {
        "instruction": "Go on: Ann fed Eve because", "output": "Eve was hungry.",
    }  # fmt: skip
    assert templates.fill(go_on, case, True)["instruction"] == (
        "Go on: Ann fed Eve because\nOPTIONS:\n(A) Ann was hungry.\n(B) Eve was hungry."
    )
    assert templates.fill(where, case, True) == {
        "instruction": "Ann fed Eve because _ was hungry.\nWhat belongs where the _ is?\nOPTIONS:\n(A) Ann\n(B) Eve",
        "output": "Eve",
    }
    assert templates.fill("Q: {question}{options}\nA:", case_of("openbookqa"), True) == {
        "instruction": "Q: Sheep give us\nOPTIONS:\n(A) iron\n(B) wood\n(C) wool\nA:", "output": "wool",
    }  # fmt: skip
    assert templates.fill("Q: {question}{options}\nA:", case_of("openbookqa"), False)["instruction"] == (
        "Q: Sheep give us\nA:"
    )
    assert case_of("copa").fields["ask"] == "What happened as a result?"
    assert case_of("record").choices == ("Ann", "Rome", "Bob")
    assert case_of("record").fields["passage"] == "Ann met Bob in Rome.\n- They talked"
    assert case_of("hellaswag").fields["question"] == "How to sweep. Take a broom."
    assert sorted(case_of("sciq").choices) == ["salt", "sand", "steel", "sugar"]
    assert case_of("trec").fields["labels"] == "abbreviation, entity, description, person, location or number"


def test_a_sentence_that_begins_with_the_blank_is_in_no_template_that_goes_on_from_before_it():
    case = Case({"question": "_ sang.", "before": "", "rest": " sang."}, ("Ann", "Eve"), "Ann")
    made = [templates.fill(one, case, False) for one in templates.usable("blank", case, False)]
    assert made and all("_ sang." in one["instruction"] for one in made)


def test_more_options_than_letters():
    case = Case({"question": "?"}, tuple(f"n{i}" for i in range(54)), "n53")
    lines = templates.fill("{question}", case, True)["instruction"].split("\n")
    assert [lines[2 + i] for i in (0, 25, 26, 51, 52, 53)] == [
        "(A) n0", "(Z) n25", "(AA) n26", "(AZ) n51", "(BA) n52", "(BB) n53",
    ]  # fmt: skip


texts = st.text(st.sampled_from("ab {}\n_%\\\"'é\u2028"), min_size=1, max_size=12).filter(str.strip)


@given(texts, texts, texts, st.sampled_from(sorted(templates.TEMPLATES)), st.booleans())
def test_texts_are_put_in_as_they_are(question, right, wrong, kind, with_options):
    names = {name for text in templates.TEMPLATES[kind] for name in re.findall(r"{(\w+)}", "".join(text))}
    fields = dict.fromkeys(names - {"options", "choices", "answer"}, question)
    case = Case(fields | {"before": question, "rest": "."}, (wrong, right), right)
    for template in templates.usable(kind, case, with_options):
        made = templates.fill(template, case, with_options)
        assert question.strip() in made["instruction"]
        assert made["output"] in (right.strip(), f"{right}.".strip())
        if with_options:
            assert all(f") {text.strip()}" in made["instruction"] for text in (wrong, right))


@pytest.mark.parametrize("task", ("cola", "sst2", "mrpc", "qqp", "mnli", "rte", "qnli", "boolq"))
def test_the_plain_form_of_classification_is_the_hubs_in_other_names(task):
    row, _ = ROWS[task]
    columns = list(raw_tasks.DATA_SETS[task].reader.fields.values())
    plain = {"label": row["label"]} | dict(zip(("text", "text2"), (row[name] for name in columns), strict=False))
    assert raw_tasks.read_case(raw_tasks.known(task), plain, "here") == case_of(task)


@pytest.mark.parametrize(
    ("task", "changes", "said"),
    [
        ("sst2", {"label": 2}, "the label is 2; it must be 0 to 1"),
        ("sst2", {"label": -1}, "the label is -1"),
        ("sst2", {"label": True}, "the label is True"),
        ("sst2", {"label": "1"}, "the label is '1'"),
        ("sst2", {"sentence": None}, "the field 'sentence' is no text"),
        ("sst2", {"sentence": "a \ud800"}, "holds half a character at position 2"),
        ("sst2", {"sentence": ...}, "no field 'sentence'"),
        ("sst2", {"label": ...}, "no field 'label'"),
        ("trec", {"coarse_label": ...}, "no field 'coarse_label' .nor labels.json for the field 'label'"),
        ("piqa", {"sol2": ...}, "no field 'sol2'; baber/piqa has it"),
        ("piqa", {"sol2": " "}, "each of its choices must be a text"),
        ("piqa", {"sol2": "a \ud800"}, "holds half a character"),
        ("piqa", {"label": 2}, "the answer is 2; it must be one of 0, 1"),
        ("copa", {"question": "why"}, "the question is 'why'; it must be cause or effect"),
        ("siqa", {"label": "0"}, "the answer is '0'; it must be one of 1, 2, 3"),
        ("arc_easy", {"answerKey": "E"}, "the answer is 'E'; it must be one of 1, 2, 3"),
        ("arc_easy", {"choices": {"text": ["a"], "label": ["2"]}}, "a question with 1 choice; two are the least"),
        ("arc_easy", {"choices": "iron"}, "not built as the rows of allenai/ai2_arc are"),
        ("arc_easy", {"choices": ["a", "b"], "answer": 2}, "answer is 2; of 2 choices it is 0 to 1"),
        ("arc_easy", {"choices": ["a"], "answer": 0}, "a question with 1 choice"),
        ("winogrande", {"answer": ""}, "the answer is ''; it must be one of 1, 2"),
        ("record", {"answers": []}, "the answer is None"),
        ("gsm8k", {"answer": ...}, "no field 'answer'"),
        ("gsm8k", {"answer": " "}, "the answer is empty"),
        ("triviaqa", {"answer": {}}, "no field 'value'"),
    ],
)
def test_what_is_no_row_is_one_line(task, changes, said):
    row = {name: value for name, value in (ROWS[task][0] | changes).items() if value is not ...}
    with pytest.raises(UserError, match=said) as error:
        raw_tasks.read_case(raw_tasks.known(task), row, "FILE, line 7")
    assert str(error.value).startswith("FILE, line 7: ") and "\n" not in str(error.value)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 4)
    | st.floats(allow_nan=False)
    | st.sampled_from(["", "a", "1", "\ud800"]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(["text", "label", "value"]), values),
    max_leaves=4,
)


@settings(max_examples=300)
@given(st.sampled_from(sorted(ROWS)), st.randoms(use_true_random=False), anything)
def test_whatever_stands_in_a_column_is_read_as_text_or_is_one_line(task, rng, value):
    row = ROWS[task][0] | {rng.choice(sorted(ROWS[task][0])): value}
    try:
        case = raw_tasks.read_case(raw_tasks.known(task), row, "FILE, line 7")
    except UserError as error:
        assert str(error).startswith("FILE, line 7: ") and "\n" not in str(error)
        return
    for text in (*case.fields.values(), *case.choices, case.answer):
        text.encode()
    assert not case.choices or case.answer in case.choices
    for one in templates.usable(raw_tasks.DATA_SETS[task].kind, case, True):
        assert templates.fill(one, case, True)["output"]


# ---------------------------------------------------------------- the step


def write_rows(folder, task: str, rows: list) -> None:
    (folder / task).mkdir(parents=True, exist_ok=True)
    (folder / task / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def raw(tmp_path):
    """A folder of three tasks: in plain form, in the hub's columns, and free questions; some texts hold braces."""
    folder = tmp_path / "raw"
    question = [
        {"question": f"What is {i} in {{base}}?", "choices": [f"{i}", "none"], "answer": i % 2} for i in range(30)
    ]
    write_rows(folder, "arc_easy", question)
    write_rows(folder, "mrpc", [ROWS["mrpc"][0] | {"sentence1": f"He left {i}.", "label": i % 2} for i in range(30)])
    write_rows(folder, "gsm8k", [{"question": f"{i} and 1?", "answer": f"#### {i + 1}"} for i in range(30)])
    return folder


def words(raw, **constants) -> list[str]:
    values = {
        "scale": "paper", "device": "cpu", "RUN_DIR": raw.parent / "runs", "RAW_PATH": raw, "domains_from": "tasks",
        "num_domains": 3, "held_out": 4, "score_sequences": 8, "base_model": "llama/none", "steps": ("data",),
        **constants,
    }  # fmt: skip
    return [
        word for name, value in values.items()
        for word in (f"--{name}", *map(str, value if isinstance(value, tuple) else (value,)))
    ]  # fmt: skip


def lines_of(raw, task: str) -> list[dict]:
    path = raw.parent / f"runs/hemoe/data/train/{task}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_from_raw_data_to_domains(raw):
    result = run_script(SCRIPT, words(raw, steps=("data", "domains")))
    assert result.returncode == 0, result.stderr[-2000:]
    assert "instructions: arc_easy 30, gsm8k 30, mrpc 30" in result.stdout
    record = read_json(raw.parent / "runs/hemoe/seed0/domains.json")
    assert record["names"] == ["arc_easy", "gsm8k", "mrpc"] and len(record["used"]) == 3 * 26
    examples = read_examples(raw.parent / "runs/hemoe/data/train")
    assert len(examples) == 90 and set(examples[0]) == {"instruction", "output", "task"}
    assert {row["output"] for row in lines_of(raw, "mrpc")} == {"yes", "no"}
    for i, row in enumerate(lines_of(raw, "arc_easy")):
        assert f"What is {i} in {{base}}?" in row["instruction"] and f"\n(A) {i}\n(B) none" in row["instruction"]
        assert row["output"] == ("none" if i % 2 else f"{i}")
    assert len({re.sub(r"\d+", "", row["instruction"]) for row in lines_of(raw, "arc_easy")}) > 4  # templates


def test_the_same_each_time_and_a_changed_source_is_refused(raw):
    call_main(SCRIPT, words(raw))
    files = {path: path.read_bytes() for path in (raw.parent / "runs/hemoe/data").rglob("*.json*")}
    times = {path: path.stat().st_mtime_ns for path in files}
    call_main(SCRIPT, words(raw))
    assert times == {path: path.stat().st_mtime_ns for path in files}
    call_main(SCRIPT, words(raw, RUN_DIR=raw.parent / "again", seed=1))
    for path, content in files.items():
        if path.suffix == ".jsonl":
            assert (raw.parent / "again" / path.relative_to(raw.parent / "runs")).read_bytes() == content
    for constants, said in (
        ({"with_options": False}, "with_options was True, is now False"),
        ({"raw_examples": 10}, "raw_examples was 5000, is now 10"),
        ({"raw_tasks": ("mrpc",)}, "raw_tasks was .*, is now .'mrpc'"),
    ):
        with pytest.raises(UserError, match=said):
            call_main(SCRIPT, words(raw, **constants))
    write_rows(raw, "gsm8k", [{"question": "1 and 1?", "answer": "#### 3"}] * 30)
    with pytest.raises(UserError, match="raw_sha256 was .*, is now"):
        call_main(SCRIPT, words(raw))


def test_every_template_of_each_row_and_no_row_on_both_sides(raw):
    call_main(SCRIPT, words(raw, steps=("data", "domains"), every_template=True, with_options=False))
    rows = lines_of(raw, "gsm8k")
    assert len(rows) == 30 * len(templates.TEMPLATES["arithmetic"])
    assert all(f"{row['row']} and 1?" in row["instruction"] for row in rows)
    assert [row["row"] for row in rows] != sorted(row["row"] for row in rows)
    assert not any("OPTIONS" in row["instruction"] for row in lines_of(raw, "arc_easy"))
    record = read_json(raw.parent / "runs/hemoe/seed0/domains.json")
    examples = read_examples(raw.parent / "runs/hemoe/data/train")
    held = {(examples[i]["task"], examples[i]["row"]) for chosen in record["held"].values() for i in chosen}
    assert held and not held & {(examples[i]["task"], examples[i]["row"]) for i in record["used"]}


def test_a_sample_of_the_rows_and_none_that_are_long(raw):
    long = {"question": "x" * 3000, "answer": "1"}
    write_rows(raw, "triviaqa", [*[{"question": f"{i}?", "answer": "1"} for i in range(20)], long])
    call_main(SCRIPT, words(raw, raw_examples=10, raw_tasks=("mrpc", "triviaqa")))
    assert len(lines_of(raw, "mrpc")) == 10 and len(lines_of(raw, "triviaqa")) >= 9
    call_main(SCRIPT, words(raw, raw_examples=0, raw_tasks=("triviaqa",), RUN_DIR=raw.parent / "all"))
    record = read_json(raw.parent / "all/hemoe/data/complete.json")
    assert record["instructions"] == {"triviaqa": {"examples": 20, "too_long": 1}}
    write_rows(raw, "triviaqa", [long])
    with pytest.raises(UserError, match="no example of triviaqa has less than 3000 characters"):
        call_main(SCRIPT, words(raw, raw_tasks=("triviaqa",), RUN_DIR=raw.parent / "none"))


def test_labels_of_a_folder_win_over_the_hubs(raw):
    write_rows(raw, "trec", [{"text": f"Who was {i}?", "label": 0} for i in range(6)])
    with pytest.raises(UserError, match=r"trec/train.jsonl, line 1: no field 'coarse_label' .nor labels.json"):
        call_main(SCRIPT, words(raw))
    (raw / "trec/labels.json").write_text('["person", "place"]')
    call_main(SCRIPT, words(raw))
    assert {row["output"] for row in lines_of(raw, "trec")} == {"person"}
    assert all("(B) place" in row["instruction"] for row in lines_of(raw, "trec"))
    for text, said in (("{", "no JSON"), ('"ab"', "not a list"), ('["a"]', "not a list"), ('["a", 1]', "not a list")):
        (raw / "trec/labels.json").write_text(text)
        with pytest.raises(UserError, match=f"trec/labels.json: {said}"):
            call_main(SCRIPT, words(raw))
    (raw / "trec/labels.json").unlink()
    (raw / "gsm8k/labels.json").write_text('["a", "b"]')
    with pytest.raises(UserError, match="gsm8k has no labels"):
        call_main(SCRIPT, words(raw))


def test_questions_and_raw_data_at_scale_real(raw):
    (raw / "arc_easy/test.jsonl").write_text((raw / "arc_easy/train.jsonl").read_text())
    call_main(SCRIPT, words(raw, scale="real", QUESTIONS_PATH=raw, eval_questions=5))
    data = raw.parent / "runs/hemoe/data"
    assert sorted(path.name for path in data.rglob("[!.]*.*")) == [
        "arc_easy.jsonl", "arc_easy.jsonl", "arc_easy.yaml", "complete.json", "gsm8k.jsonl", "mrpc.jsonl",
    ]  # fmt: skip


def test_without_raw_data_the_step_depends_on_what_it_did_before(raw):
    (raw / "arc_easy/test.jsonl").write_text((raw / "arc_easy/train.jsonl").read_text())
    call_main(SCRIPT, words(raw, scale="real", RAW_PATH="", QUESTIONS_PATH=raw, raw_examples=7))
    assert set(read_json(raw.parent / "runs/hemoe/data/complete.json")["identity"]) == {
        "scale", "doc_train_examples", "doc_test_examples", "eval_questions", "questions_sha256",
    }  # fmt: skip
    with pytest.raises(UserError, match="made with other constants .*raw_sha256 was None"):
        call_main(SCRIPT, words(raw, scale="real", QUESTIONS_PATH=raw))


@pytest.mark.parametrize(
    ("constants", "said"),
    [
        (
            {"RAW_PATH": "/nowhere"},
            "RAW_PATH: there is no folder /nowhere; give one with TASK/train.jsonl a task, or hub",
        ),
        ({"raw_tasks": ("arc",)}, "RAW_PATH: no data set 'arc' is known; there are anli, arc_challenge"),
        ({"raw_tasks": ("piqa",)}, "raw_tasks: .*piqa/train.jsonl does not exist"),
        ({"raw_examples": -1}, "raw_examples is -1; it must be 0 or more"),
        ({"scale": "tiny"}, "RAW_PATH: at scale tiny the model is trained on docstrings; give --scale real or paper"),
        ({"INSTRUCTIONS_PATH": "mine"}, "RAW_PATH makes the instructions in .*; leave INSTRUCTIONS_PATH .mine. away"),
    ],
)
def test_mistakes_are_one_line(raw, constants, said):
    with pytest.raises(UserError, match=said) as error:
        call_main(SCRIPT, words(raw, **constants))
    assert "\n" not in str(error.value) and not (raw.parent / "runs/hemoe/data/complete.json").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"question": "a", "answer": "b"}\n{"question": "\xff"}\n', "line 2: not UTF-8; save the file as UTF-8"),
        (b'{"question": "a", "answer": "b"}\n\n{"question": "c"}\n', "line 3: no field 'answer'"),
        (b'{"question": "a", "answer": "b"}\n{"questi', "line 2: not whole JSON"),
        (b'["a"]\n', "line 1: not a JSON object"),
        (b"", "train.jsonl is empty"),
    ],
)
def test_damaged_files_are_one_line_wherever_the_damage_is(raw, content, said):
    (raw / "gsm8k/train.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"gsm8k/train.jsonl.*{said}|{said}") as error:
        call_main(SCRIPT, words(raw, raw_examples=1))
    assert "\n" not in str(error.value) and "gsm8k" in str(error.value)
    assert not (raw.parent / "runs/hemoe/data/train").exists()


def test_a_folder_without_tasks_and_files_of_another_source(raw, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no TASK/train.jsonl; a task is anli"):
        call_main(SCRIPT, words(raw, RAW_PATH=tmp_path / "empty"))
    place = raw.parent / "runs/hemoe/data/train"
    place.mkdir(parents=True)
    (place / "mine.jsonl").write_text("")
    with pytest.raises(UserError, match="holds mine.jsonl, which is not of these raw data; remove it"):
        call_main(SCRIPT, words(raw))


def test_instructions_that_are_not_utf8_are_one_line(tmp_path):
    (tmp_path / "copy.jsonl").write_bytes(
        b'{"instruction": "a", "output": "b"}\n{"instruction": "\xe9", "output": "b"}\n'
    )
    with pytest.raises(UserError, match="copy.jsonl, line 2: not UTF-8"):
        read_examples(tmp_path)
    (tmp_path / "copy.jsonl").write_text('{"instruction": "a", "output": 3}\n')
    with pytest.raises(UserError, match='line 1: not a JSON object with "instruction" and "output" .*is no text'):
        read_examples(tmp_path)


def test_from_the_hub(raw, monkeypatch):
    """Each data set is asked for by name, configuration and split; what was fetched once is not fetched again."""
    import datasets

    asked = []

    def load_dataset(name, config=None, split=None, revision=None, data_dir=None):
        asked.append((name, config, split, revision, data_dir))
        if name == "aps/super_glue" and revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found super_glue.py")
        (task, *_) = [
            task for task, one in raw_tasks.PAPER.items()
            if (one.hub, one.config or None, one.split) == (name, config or data_dir, split)
        ]  # fmt: skip
        return datasets.Dataset.from_list([ROWS[task][0]] * 3)

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # no probing
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    call_main(SCRIPT, words(raw, RAW_PATH="hub", raw_examples=2))
    assert {task for task in raw_tasks.PAPER if len(lines_of(raw, task)) == 2} == set(raw_tasks.PAPER)
    assert ("facebook/anli", None, "train_r1", None, None) in asked
    assert ("aps/super_glue", None, "train", "refs/convert/parquet", "wsc.fixed") in asked
    asked.clear()
    call_main(SCRIPT, words(raw, RAW_PATH="hub", raw_examples=2))
    assert not asked


def test_a_hub_out_of_reach_is_one_line(raw, monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nand a second line")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UserError, match="RAW_PATH: openai/gsm8k cannot be had .*gsm8k/train.jsonl and give --RAW_PATH FOLDER"
    ):
        call_main(SCRIPT, words(raw, RAW_PATH="hub", raw_tasks=("gsm8k",)))


def test_what_datasets_writes_as_json_lines_is_read(raw):
    """`to_json` of a data set of the hub: its own columns, labels as numbers."""
    import datasets

    for task in ("arc_challenge", "siqa", "triviaqa"):
        (raw / task).mkdir()
        datasets.Dataset.from_list([ROWS[task][0]] * 3).to_json(raw / task / "train.jsonl")
    c = SimpleNamespace(RAW_PATH=str(raw), raw_tasks=("all",), raw_examples=0)
    found = instructions.read(c, instructions.tasks(c))
    for task in ("arc_challenge", "siqa", "triviaqa"):
        assert list(found[task].cases.values()) == [case_of(task)] * 3
