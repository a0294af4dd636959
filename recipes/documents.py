"""Prompts with long contexts, without a data set: the target's own long answers are the documents.

python recipes/documents.py ANSWERS.jsonl RAW.jsonl [--words 120] [--seed 0]
flashdraft prompts RAW.jsonl --out PROMPTS.jsonl
flashdraft regenerate PROMPTS.jsonl --out LONG.jsonl --max-new-tokens 256

ANSWERS are what `flashdraft regenerate --max-new-tokens 700 --temperature 0.8` wrote for any
prompts, best for those of `flashdraft prompts --self`; a small model's greedy texts of that length
repeat themselves. Every answer of `--words` words or more becomes a text to summarise and a text to
answer from, there among two others, with the prompt that it was written for as the question; one of
its sentences is to be translated. The answers to these are the target's own again.
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


class Document(NamedTuple):
    question: str  # what it was written for
    text: str


def read_documents(path: Path, words: int) -> list[Document]:
    """The answers of so many words or more, in the file's order."""
    documents = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            text = row["response"].strip()
            question = row.get("prompt")
            is_long = len(text.split()) >= words
            if is_long and isinstance(question, str):
                documents.append(Document(question, text))
    return documents


def prompts_of(place: int, documents: list[Document], draws: random.Random) -> list[str]:
    document = documents[place]
    summary = draws.choice(SUMMARIES).format(text=document.text)

    passages = [document.text]
    for other in draws.sample(documents, k=2):
        passages.append(_beginning(other.text))
    draws.shuffle(passages)
    template = draws.choice(QUESTIONS)
    question = template.format(text="\n\n".join(passages), question=document.question)

    prompts = [summary, question]
    sentences = SENTENCE.findall(document.text)
    if sentences:
        language = draws.choice(LANGUAGES)
        sentence = draws.choice(sentences)
        prompts.append(TRANSLATION.format(language=language, sentence=sentence))
    return prompts


def _beginning(text: str, words: int = 80) -> str:
    return " ".join(text.split()[:words])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("answers", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--words", type=int, default=120, help="of a document, at least")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    documents = read_documents(options.answers, options.words)
    if len(documents) < 3:
        sys.exit(f"{options.answers}: fewer than three answers of {options.words} words")
    draws = random.Random(options.seed)
    prompts = []
    for place in range(len(documents)):
        prompts += prompts_of(place, documents, draws)
    draws.shuffle(prompts)

    with options.prompts.open("x", encoding="utf-8") as out:
        for prompt in prompts:
            out.write(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n")
    print(f"{len(prompts)} prompts from {len(documents)} documents")


if __name__ == "__main__":
    main()
