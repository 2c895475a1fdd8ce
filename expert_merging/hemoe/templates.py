"""Instruction templates, all written for this repository, and how one is filled with a case: a row of a raw data set.

A template is the text of an instruction, or a pair: that text, and how an answer is put (else as it stands). In it

{options}  is where the answers to choose from are listed, where they are to be;
{choices}  the same, in a template that makes no sense without them: it is left out where they are not listed;
neither    means that they come last.

The other fields are those that the data set has (raw_tasks.py); {labels} is "yes or no", say, in classification.
"""

from dataclasses import dataclass

Template = str | tuple[str, str]

LONGEST = 3000  # characters of an instruction with its output: what is that long is dropped, as the authors do

_ENDING = "{answer}{rest}"  # WinoGrande: what fills the blank, and what follows it

TEMPLATES: dict[str, tuple[Template, ...]] = {
    # -- classification
    "entailment": (  # yes or no
        "{premise}\n\nIf this is so, is the following sure as well?\n{hypothesis}",
        "Text: {premise}\nStatement: {hypothesis}\nDoes the statement follow from the text?",
        "Premise: {premise}\nConclusion: {hypothesis}{options}\nDoes the conclusion hold?",
        "Read this:\n{premise}\n\nSomebody who has read it says: {hypothesis}\nDid they learn that from the text?",
        "A claim: {hypothesis}\nIts only source: {premise}\nDoes the source bear the claim out?",
        "Statement: {hypothesis}\n\nIs it backed by this text?\n{premise}",
        "You know this and nothing else: {premise}\nWould you put your name to this: {hypothesis}",
    ),
    "truth": (  # yes, no or not known
        "{premise}\n\nIf this is so, is the following true as well?\n{hypothesis}",
        "Text: {premise}\nStatement: {hypothesis}\nIs the statement true ({labels})?",
        "Read this:\n{premise}\n\nSomebody who has read it says: {hypothesis}\nAre they right?",
        "{premise}\nJudging by this, is it true? {hypothesis}",
        "You know this and nothing else: {premise}\nIs it true ({labels})? {hypothesis}",
        "Check a claim by its source.\nClaim: {hypothesis}\nSource: {premise}{options}\nIs the claim true?",
        "Premise: {premise}\nHypothesis: {hypothesis}\nGiven the premise, is the hypothesis true?",
    ),
    "answered": (
        "Question: {question}\nSentence: {sentence}\nIs the question answered by the sentence?",
        "Somebody asks: {question}\nThey are told: {sentence}\nDo they know the answer now?",
        "{sentence}\n\nCan this be answered from the line above alone? {question}",
        "We look for the answer to: {question}\nIs it in this sentence? {sentence}",
        "From an encyclopaedia: {sentence}\nIs that enough to answer the question: {question}",
        "1. {question}\n2. {sentence}\nDoes 2 answer 1?",
        "A search engine was asked: {question}\nIt came up with: {sentence}{options}\nIs the answer in there?",
    ),
    "paraphrase": (
        "Is one of these {thing}s a rewording of the other?\n1. {first}\n2. {second}",
        "First {thing}: {first}\nSecond {thing}: {second}\nIs their meaning the same?",
        "An editor keeps only one of two {thing}s that mean the same. May one of these go?\n- {first}\n- {second}",
        "{first}\n\nCould one put it like this without changing what is meant?\n{second}",
        "Compare two {thing}s.\nOne: {first}\nThe other: {second}{options}\nAre they paraphrases?",
        "Somebody wrote: {first}\nSomebody else wrote: {second}\nDid both write the same in other words?",
        "{first}\n{second}\n\nAre the two {thing}s above equivalent?",
        "Does the {thing} \"{first}\" mean what \"{second}\" means?",
    ),
    "grammar": (
        "Is this a well-formed English sentence?\n{sentence}",
        "{sentence}\n\nWould a native speaker find this sentence natural?",
        "A learner of English wrote: {sentence}\nIs it right?",
        "Check the grammar: {sentence}\nIs it correct?",
        "Sentence: {sentence}{options}\nCan one say that in English?",
        "Would a linguist let this example stand as it is? {sentence}",
        "{sentence}\nIs that grammatical?",
    ),
    "sentiment": (
        "A line from a film review: {text}\nIs it {labels}?",
        "{text}\n\nHow does the writer of this feel about the film: {labels}?",
        "What is the tone of this remark about a film, {labels}?\n{text}",
        "Review: {text}{options}\nVerdict:",
        "Somebody said of a film: {text}{options}\nTheir opinion of it is",
        "Sort this opinion of a film as {labels}.\n{text}",
        "{text}{options}\nThe sentiment of these words is",
    ),
    "question type": (
        "What kind of answer does this question ask for: {labels}?\n{text}",
        "{text}{options}\nThe answer will be of the kind",
        "Question: {text}{options}\nType of the answer:",
        "Before looking for an answer, say what it will be ({labels}): {text}",
        "Sort this question by what it asks for, {labels}.\n{text}",
        "Somebody asks: {text}\nWhat do they want to hear ({labels})?",
    ),
    "yes or no": (
        "{passage}\n\nNow, {question}?",
        "Passage: {passage}\nQuestion: {question}?{options}\nAnswer:",
        "Answer yes or no by the passage below: {question}?\n\n{passage}",
        "Somebody wants to know: {question}?\nAn encyclopaedia says: {passage}\nWhat is the answer, yes or no?",
        "{passage}\nGoing by this text, {question}?",
        "Look it up in the text: {question}?\nText: {passage}",
        "The question is \"{question}?\". What does this text say to it, yes or no?\n{passage}",
    ),
    "right answer": (
        "{paragraph}\n\nQuestion: {question}\nSuggested answer: {candidate}\nIs it right?",
        "Text: {paragraph}\nAfter reading it, somebody was asked: {question}\nThey said: {candidate}\nIs that correct?",
        "{question}\n{candidate}\n\nDoes the text below say so?\n{paragraph}",
        "Mark an exam. The text was: {paragraph}\nThe question was: {question}\nA pupil wrote: {candidate}{options}\nCorrect?",
        "{paragraph}\n\nWould \"{candidate}\" be a right answer to \"{question}\"?",
        "By this text, is \"{candidate}\" among the answers to the question?\nQuestion: {question}\nText: {paragraph}",
    ),
    "word sense": (
        "{first}\n{second}\nDoes \"{word}\" have one sense in both sentences?",
        "The word is \"{word}\".\nOne use: {first}\nAnother use: {second}\nWould a dictionary list both under one meaning?",
        "Compare how \"{word}\" is used.\n- {first}\n- {second}\nIs the meaning equal?",
        "\"{first}\" \"{second}\"\nCould \"{word}\" be explained in the same words both times?",
        "Word: {word}\nSentence 1: {first}\nSentence 2: {second}{options}\nSame sense:",
        "Is \"{word}\" the same in meaning here: {first} - and here: {second}",
    ),
    "coreference": (
        "{text}\n\nDoes \"{pronoun}\" stand for \"{noun}\" here?",
        "Text: {text}\nIs \"{noun}\" what is meant by \"{pronoun}\"?",
        "Could one write \"{noun}\" in the place of \"{pronoun}\" and say the same?\n{text}",
        "Read: {text}\nIs it right that \"{pronoun}\" points back to \"{noun}\"?",
        "{text}\nSomebody explains: \"{pronoun}\" is \"{noun}\".{options}\nAre they right?",
        "By \"{pronoun}\", does the writer of this mean \"{noun}\"?\n{text}",
    ),
    # -- multiple choice
    "question": (
        "{question}",
        "Question: {question}{options}\nAnswer:",
        "Please answer.\n{question}",
        "{question}\nWhat is the right answer?",
        "Somebody asks: {question}\nWhat do you reply?",
        "Here is a question that has one right answer.\n{question}",
        "Q: {question}{options}\nA:",
        "Pick the right answer.\n{question}{choices}",
        "{question}{choices}\nOnly one of these is right. Which?",
    ),
    "science": (
        "{question}",
        "Question: {question}{options}\nAnswer:",
        "Answer or finish this, as a science book would:\n{question}",
        "From a science test at school: {question}",
        "{question}{choices}\nThe right answer is",
        "Say what fits, going by the facts of science.\n{question}",
        "A pupil asks for help with this: {question}",
        "{question}{choices}\nWhich of these is right?",
        "Pick what answers or completes this best.\n{question}{choices}",
    ),
    "how to": (
        "How does one go about this?\n{question}",
        "Goal: {question}{options}\nSolution:",
        "{question}\nWhat works?",
        "Give practical advice.\n{question}",
        "Somebody needs help: {question}\nTell them what to do.",
        "Think of things at home and what they are good for. {question}",
        "Wanted: {question}{choices}\nWhich of the two works better?",
        "{question}{choices}\nPick what an experienced person would do.",
    ),
    "cause or effect": (
        "{premise} {ask}",
        "{premise}\n{ask}{options}\nAnswer:",
        "This happened: {premise}\n{ask}",
        "Think of everyday life.\n{premise} {ask}",
        "{premise}\nAnswer in a sentence. {ask}",
        "Situation: {premise}\nQuestion: {ask}",
        "{premise} {ask}{choices}\nWhich of the two is the more plausible?",
    ),
    # -- completion
    "ending": (
        "What comes next?\n{question}",
        "{question}",
        "Go on with this text.\n{question}",
        "Write how this ends: {question}",
        "Beginning: {question}{options}\nEnd:",
        "Read the beginning and add what follows.\n{question}",
        "{question}{choices}\nWhich of these endings is the likeliest?",
        "Only one ending makes sense here.\n{question}{choices}",
    ),
    "blank": (
        ("Go on: {before}", _ENDING),
        ("Finish the sentence so that it makes sense.\n{before}", _ENDING),
        ("Here is the beginning of a text; write the rest.\n{before}", _ENDING),
        "{question}\nWhat belongs where the _ is?",
        "Who or what is meant by the _ in this sentence?\n{question}",
        "Sentence: {question}{options}\nIn place of the _ there should be",
        "{question}{choices}\nWhich of the two makes sense in place of the _?",
    ),
    "news": (
        "{passage}\n\nBy this report, what belongs where the _ is?\n{question}",
        "News: {passage}\nA sentence about it: {question}{options}\nIn place of the _ there should be",
        "Read the report, then say who or what the _ stands for.\n{passage}\n\n{question}",
        "In the sentence \"{question}\" something is left out (_). The report tells what.\n{passage}",
        "{passage}\n\n{question}\nName what is missing there (_).",
        "Which name is missing here (_)? {question}\nThe report: {passage}",
    ),
    # -- questions
    "arithmetic": (
        "{question}",
        "Problem: {question}\nSolution:",
        "{question}\nWork it out step by step, with the result last.",
        "Solve this and show how you got there.\n{question}",
        "A pupil brings this homework: {question}\nExplain how to get the answer.",
        "Find the number that is asked for.\n{question}",
    ),
    "trivia": (
        "{question}",
        "Question: {question}\nAnswer:",
        "Quiz: {question}",
        "In a word or two: {question}",
        "A quizmaster asks: {question}\nThe right reply is",
        "Answer from what you know.\n{question}",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A row of a raw data set: what a template's fields stand for, the answers to choose from (none where the answer is
    free), and the right one."""

    fields: dict[str, str]
    choices: tuple[str, ...]
    answer: str


def usable(kind: str, case: Case, with_options: bool) -> list[Template]:
    """The templates of `kind` that make sense for a case, with the options listed or without."""
    texts = [(template, _pair(template)[0]) for template in TEMPLATES[kind]]
    return [
        template
        for template, text in texts
        if (with_options or "{choices}" not in text) and ("{before}" not in text or case.fields["before"])
    ]


def fill(template: Template, case: Case, with_options: bool) -> dict[str, str]:
    """{"instruction", "output"}; the output is the text of the answer, and the options are lettered: (A), (B), ..."""
    instruction, target = _pair(template)
    listed = ""
    if with_options and case.choices:
        texts = [target.format(answer=choice, **case.fields).strip() for choice in case.choices]
        listed = "\nOPTIONS:" + "".join(f"\n({_letter(i)}) {text}" for i, text in enumerate(texts))
        if "{options}" not in instruction and "{choices}" not in instruction:
            instruction += "{options}"
    # What stands in a field is never read as a template: braces in it stay.
    filled = instruction.format(**case.fields, options=listed, choices=listed)
    return {"instruction": filled.strip(), "output": target.format(answer=case.answer, **case.fields).strip()}


def _pair(template: Template) -> tuple[str, str]:
    return (template, "{answer}") if isinstance(template, str) else template


def _letter(number: int) -> str:
    """A to Z, then AA, AB, ..."""
    return (_letter(number // 26 - 1) if number >= 26 else "") + chr(ord("A") + number % 26)
