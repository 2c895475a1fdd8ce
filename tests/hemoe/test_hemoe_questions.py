"""Multiple-choice questions of a folder as lm_eval's tasks, and prompts that are read once for all their answers."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json
from expert_merging.data.scores import unpack
from expert_merging.hemoe import evaluation, questions, shared_prompts, small_llama
from expert_merging.hemoe.examples import read_examples

WORDS = "red green blue one two three four five cat dog bird fish who what where sat on the mat".split()


def asked(kind: str, number: int) -> list[dict]:
    rows = []
    for i in range(number):
        words = [WORDS[(i + 3 * j) % len(WORDS)] for j in range(5)]
        choices = [WORDS[(i + j) % len(WORDS)] for j in range(2 + i % 3 if kind != "blank" else 2)]
        question = f"{words[0]} {words[1]} _ {words[2]} {words[3]}" if kind == "blank" else " ".join(words)
        rows.append({"question": question, "choices": choices, "answer": i % len(choices)})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("questions")
    for task, kind in (("arc_easy", "plain"), ("winogrande", "blank"), ("social_iqa", "plain")):
        (place / task).mkdir()
        rows = asked(kind, 12)
        (place / task / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture(scope="module")
def model():
    from types import SimpleNamespace

    tokenizer = small_llama.new_tokenizer([" ".join(WORDS), "Question: Answer: Q: A:"] * 4, 300)
    torch.manual_seed(0)
    shape = SimpleNamespace(base_hidden_size=16, base_intermediate_size=24, base_layers=3, base_heads=2)
    return small_llama.new_llama(shape, tokenizer).eval(), tokenizer


def test_scores_are_those_of_the_questions_asked_one_answer_at_a_time(folder, model, tmp_path):
    """Prompts as lm_eval puts them; WinoGrande's choices in the blank, and what follows scored."""
    llama, tokenizer = model
    questions.write(questions.read(folder), tmp_path, 0)
    tasks = evaluation.load_tasks(("arc_easy", "winogrande", "social_iqa"), str(tmp_path))
    found = evaluation.accuracy(llama, tokenizer, tasks, 4)

    def likelihood(prompt: str, text: str) -> float:
        ids, start = tokenizer(prompt + text)["input_ids"], len(tokenizer(prompt)["input_ids"])
        with torch.inference_mode():
            logs = llama(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return logs[torch.arange(start - 1, len(ids) - 1), ids[start:]].sum().item()

    for task, prompt in (("arc_easy", "Question: {}\nAnswer:"), ("social_iqa", "Q: {}\nA:"), ("winogrande", "")):
        each, by_length = [], []
        for row in questions.read(folder)[task]:
            before, _, after = row["question"].partition("_")
            values = [
                likelihood(before + choice, after)
                if not prompt
                else likelihood(prompt.format(row["question"]), f" {choice}")
                for choice in row["choices"]
            ]
            normed = [value / len(choice) for value, choice in zip(values, row["choices"], strict=True)]
            each.append(values.index(max(values)) == row["answer"])
            by_length.append(normed.index(max(normed)) == row["answer"])
        assert found[task]["acc"] == pytest.approx(sum(each) / len(each))
        main = by_length if task == "arc_easy" else each
        assert unpack(found[task]["each"]).tolist() == [100.0 * right for right in main]
        assert found[task]["main"] == found[task].get("acc_norm", found[task]["acc"])


requests = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(3, 90), min_size=1, max_size=5)), min_size=1, max_size=9
)


@settings(max_examples=15, deadline=None)
@given(requests, st.integers(12, 40))
def test_a_prompt_read_once_gives_what_a_row_an_answer_gives(model, drawn, tokens):
    llama, tokenizer = model
    prompts = [[5, 9, 40, 8], [7], [60, 61, 62, 63, 64, 65], [5, 9, 40]]
    asked_for = [(("", ""), prompts[prompt], answer) for prompt, answer in drawn]
    reader = shared_prompts.SharedPrompts(tqdm(disable=True), pretrained=llama, tokenizer=tokenizer, backend="causal")
    rows = shared_prompts.rows_of(asked_for, 64)
    assert len(rows) == len({prompt for prompt, _ in drawn})
    parts = list(shared_prompts.batches(rows, tokens))
    assert sorted(map(id, rows)) == sorted(id(row) for part in parts for row in part)
    assert all(len(part) == 1 or len(part) * max(map(len, part)) <= tokens for part in parts)
    found = {number: result for part in parts for number, result in reader._read(part)}
    for number, (_, prompt, answer) in enumerate(asked_for):
        with torch.inference_mode():
            logs = llama(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        wanted = logs[torch.arange(len(answer)), answer].sum().item()
        assert found[number][0] == pytest.approx(wanted, abs=1e-4)
        assert found[number][1] == (logs.argmax(-1).tolist() == answer)


def test_a_prompt_too_long_loses_its_start():
    (row,) = shared_prompts.rows_of([(("", ""), list(range(20)), [1, 2]), (("", ""), list(range(20)), [3])], 10)
    assert row.prompt == list(range(12, 20)) and [number for number, _ in row.answers] == [0, 1]


def test_the_sample_is_fixed_and_as_large_as_asked(folder, tmp_path):
    found = questions.read(folder)
    for place in ("a", "b"):
        questions.write(found, tmp_path / place, 5)
    texts = [(tmp_path / place / "arc_easy.jsonl").read_text() for place in ("a", "b")]
    assert texts[0] == texts[1] and texts[0].count("\n") == 5
    assert "acc_norm" not in json.dumps(read_json(tmp_path / "a" / "winogrande.yaml")["metric_list"])


def test_a_task_that_is_asked_no_more_is_not_left_there(folder, tmp_path):
    found = questions.read(folder)
    questions.write(found, tmp_path / "eval", 5)
    del found["winogrande"]
    with pytest.raises(UserError, match="holds the task winogrande, which QUESTIONS_PATH has not"):
        questions.write(found, tmp_path / "eval", 5)


def test_questions_of_a_folder_that_was_copied_are_not_read_where_it_was(folder, tmp_path):
    questions.write(questions.read(folder), tmp_path / "first", 5)
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    assert evaluation.load_tasks(("arc_easy",), str(tmp_path / "first"))["tasks"].keys() == {"arc_easy"}
    with pytest.raises(UserError, match=r"arc_easy.yaml names the questions in .*first"):
        evaluation.load_tasks(("arc_easy",), str(tmp_path / "second"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("no json", "line 2: not a JSON object"),
        ('{"question": "a", "choices": ["b", "c"]}', "line 2: not a JSON object with"),
        ('{"question": "a", "choices": ["b"], "answer": 0}', "line 2: a question with 1 choice; two are the least"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', "line 2: answer is 2; of 2 choices it is 0 to 1"),
        ('{"question": "a", "choices": ["b", "c"], "answer": "b"}', "line 2: answer is 'b'"),
        ('{"question": "a", "choices": ["b", " "], "answer": 0}', "line 2: the question and each of its choices"),
        ('{"question": "a", "choices": "bc", "answer": 0}', "line 2: the question and each of its choices"),
    ],
)
def test_what_is_no_question_is_named_by_file_and_line(tmp_path, line, said):
    (tmp_path / "piqa").mkdir()
    good = '{"question": "a", "choices": ["b", "c"], "answer": 1}'
    (tmp_path / "piqa" / "test.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError, match=said) as error:
        questions.read(tmp_path)
    assert "piqa/test.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_questions_is_one_line(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        questions.read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no TASK/test.jsonl"):
        questions.read(tmp_path)
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "test.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no questions"):
        questions.read(tmp_path)


def test_other_separators_than_ends_of_lines_end_no_line(tmp_path):
    """U+2028 and form feeds stand unescaped in JSON's texts; blank lines between questions do not shift the numbers."""
    (tmp_path / "piqa").mkdir()
    row = '{"question": "one\u2028two\u0085three", "choices": ["b", "c"], "answer": 1}'
    (tmp_path / "piqa" / "test.jsonl").write_bytes(f"{row}\r\n\r\n{row}\n".encode())
    assert [one["question"] for one in questions.read(tmp_path)["piqa"]] == ["one\u2028two\u0085three"] * 2
    (tmp_path / "piqa" / "test.jsonl").write_text(f"{row}\n\nno json\n")
    with pytest.raises(UserError, match="line 3: not a JSON object"):
        questions.read(tmp_path)
    (tmp_path / "copy.jsonl").write_bytes('{"instruction": "one\u2028two", "output": "three"}\r\n'.encode())
    assert [one["instruction"] for one in read_examples(tmp_path)] == ["one\u2028two"]
