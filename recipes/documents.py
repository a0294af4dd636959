"""Prompts with long contexts, without a data set: the target's own answers are the documents.

python recipes/documents.py ANSWERS.jsonl RAW.jsonl [--words 120] [--kinds summary,question]
flashdraft prompts RAW.jsonl --out PROMPTS.jsonl
flashdraft regenerate PROMPTS.jsonl --out LONG.jsonl --max-new-tokens 256

ANSWERS are what `flashdraft regenerate` wrote for any prompts, best for those of `flashdraft
prompts --self`; for documents of 700 tokens with `--max-new-tokens 700 --temperature 0.8`, as a
small model's greedy texts of that length repeat themselves. Every answer of `--words` words or more
becomes a text to summarise and a text to answer from, there among two others, with the prompt that
it was written for as the question; one of its sentences is to be translated. The answers to these
are the target's own again. Answers to a translation become prompts to translate back: run it on
LONG.jsonl once more.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path
from typing import NamedTuple

SUMMARIES = (
    "Summarize: {text}",
    "Summarize the following text in three sentences.\n\n{text}",
    "{text}\n\nWhat are the main points of the text above?",
    "Give me a short summary of this:\n{text}",
    "Read the text and say in one paragraph what it is about.\n\nText: {text}",
)
QUESTIONS = (
    "{text}\n\n{question}",
    "Answer the question from the passages below.\n\n{text}\n\nQuestion: {question}",
    "Context:\n{text}\n\nUsing only the context, answer: {question}",
    "{question}\n\nUse these notes:\n{text}",
)
LANGUAGES = ("German", "French", "Spanish", "Italian")
TRANSLATION = "Translate English to {language}: {sentence}"
SENTENCE = re.compile(r"[A-Z][^.!?\n]{40,200}[.!?]")


TRANSLATED = re.compile(r"Translate English to (\w+): ")
KINDS = ("summary", "question", "translation", "back")


class Document(NamedTuple):
    question: str  # what it was written for
    text: str


class Source(NamedTuple):
    documents: list[Document]  # answers that are long enough
    translations: list[Document]


def read_answers(path: Path, words: int) -> Source:
    """The answers that prompts are made of, in the file's order."""
    source = Source([], [])
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            question = row.get("prompt")
            if not isinstance(question, str):
                continue

            answer = Document(question, row["response"].strip())
            if TRANSLATED.match(question):
                source.translations.append(answer)
            elif len(answer.text.split()) >= words:
                source.documents.append(answer)
    return source


def prompts_of(
    place: int, documents: list[Document], languages: list[str], draws: random.Random
) -> dict[str, str]:
    """One document's prompts by their kind."""
    document = documents[place]
    summary = draws.choice(SUMMARIES).format(text=document.text)

    passages = [document.text]
    for other in draws.sample(documents, k=2):
        passages.append(_beginning(other.text))
    draws.shuffle(passages)
    template = draws.choice(QUESTIONS)
    question = template.format(text="\n\n".join(passages), question=document.question)

    prompts = {"summary": summary, "question": question}
    sentences = SENTENCE.findall(document.text)
    if sentences:
        language = draws.choice(languages)
        sentence = draws.choice(sentences)
        prompts["translation"] = TRANSLATION.format(language=language, sentence=sentence)
    return prompts


def back_translation(answer: Document) -> str:
    """The prompt that has a translation translated back; of its first lines, one paragraph."""
    asked = TRANSLATED.match(answer.question)
    assert asked is not None
    paragraph = answer.text.split("\n\n")[0]
    return f"Translate {asked[1]} to English: {paragraph}"


def _beginning(text: str, words: int = 80) -> str:
    return " ".join(text.split()[:words])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("answers", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--words", type=int, default=120, help="of a document, at least")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of prompts; default: %(default)s")
    parser.add_argument(
        "--languages", default=",".join(LANGUAGES), help="one named twice is drawn twice as often"
    )
    parser.add_argument("--most", type=int, help="prompts, at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    unknown = set(kinds) - set(KINDS)
    if unknown:
        parser.error(f"--kinds: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")

    source = read_answers(options.answers, options.words)
    documents = source.documents
    if len(documents) < 3 and not source.translations:
        sys.exit(f"{options.answers}: fewer than three answers of {options.words} words")
    draws = random.Random(options.seed)
    languages = options.languages.split(",")
    prompts = []
    if len(documents) >= 3:  # a question has two other passages
        for place in range(len(documents)):
            made = prompts_of(place, documents, languages, draws)
            prompts += [made[kind] for kind in kinds if kind in made]
    if "back" in kinds:
        prompts += [back_translation(answer) for answer in source.translations]
    draws.shuffle(prompts)
    prompts = prompts[: options.most]

    with options.prompts.open("x", encoding="utf-8") as out:
        for prompt in prompts:
            out.write(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n")
    number = len(documents) + len(source.translations)
    print(f"{len(prompts)} prompts from {number} documents and translations")


if __name__ == "__main__":
    main()
