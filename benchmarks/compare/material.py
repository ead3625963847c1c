"""What the base model learns, and what it is then tuned to do: text that every Python installation has, and invented
facts and skills whose answers are exact.

People have a town, a trade and, the first half of them, an animal, each said in a statement and asked in a question;
some are famous, and spoken of most. Skills rewrite a few letters or digits. Names and answers are drawn from a seed,
so nothing of it can be known before.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from s2ft_compile.cli.corpus import build_tokenizer, modules, topics

SEED = 0
PEOPLE = 160
FAMOUS = 64  # the first of them, of whom the second half of the pretraining speaks alone
IGNORED = -100
Line = tuple[str, str]  # what is given, and the answer that is learned


@dataclass(frozen=True)
class Rows:
    """int64 (rows, length) tokens and labels; `IGNORED` is not learned. exact: whether a row has one right answer."""

    tokens: Tensor
    labels: Tensor
    exact: bool

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index) -> "Rows":
        return Rows(self.tokens[index], self.labels[index], self.exact)


@dataclass(frozen=True)
class Task:
    """train: what is tuned on. choose: what a learning rate is chosen by. test: what is reported. far: the same
    ability asked for in another way, which was never tuned on.
    """

    title: str
    train: Rows
    choose: Rows
    test: Rows
    far: Rows


@dataclass(frozen=True)
class Person:
    name: str
    town: str
    trade: str
    animal: str


STATEMENTS = {"town": ("{} lives in", "town"), "trade": ("{} works as a", "trade"), "animal": ("{} keeps a", "animal")}
QUESTIONS = {
    "town": "Question: where does {} live? Answer:",
    "trade": "Question: what work does {} do? Answer:",
    "animal": "Question: which animal does {} keep? Answer:",
}
SKILLS = {
    "copy": lambda x: x,
    "first": lambda x: x[:1],
    "last": lambda x: x[-1:],
    "double": lambda x: [c for c in x for _ in range(2)],
    "rotate": lambda x: x[1:] + x[:1],
}
LETTERS, DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"


def people() -> list[Person]:
    drawn = random.Random(SEED)

    def words(number: int, syllables: int) -> list[str]:
        distinct: dict[str, None] = {}
        while len(distinct) < number:
            distinct["".join(drawn.choice("bdfgklmnprstvz") + drawn.choice("aeiou") for _ in range(syllables))] = None
        return list(distinct)

    names, towns, trades, animals = words(PEOPLE, 3), words(24, 2), words(24, 3), words(24, 2)
    return [
        Person(name.title(), drawn.choice(towns).title(), drawn.choice(trades), drawn.choice(animals)) for name in names
    ]


def statement(person: Person, what: str) -> Line:
    return STATEMENTS[what][0].format(person.name), f" {getattr(person, what)}"


def question(person: Person, what: str) -> Line:
    return QUESTIONS[what].format(person.name), f" {getattr(person, what)}"


def request(person: Person, what: str) -> Line:
    """A form that the base model never saw."""
    return f"<{what}> {person.name} =>", f" {getattr(person, what)}"


def exercise(name: str, rewrite, drawn: random.Random, alphabet: str, least: int = 3, most: int = 5) -> Line:
    given = drawn.sample(alphabet, drawn.randint(least, most))
    return f"{name}: {' '.join(given)} ->", "".join(f" {c}" for c in rewrite(given))


class Material:
    """All texts in tokens. length: of a block of running text."""

    def __init__(self, length: int):
        self.length = length
        texts = list(modules())
        self.raw = {
            "docs": "\n\n".join(docs for i, (docs, _) in enumerate(texts) if i % 8),
            "docs held out": "\n\n".join(docs for i, (docs, _) in enumerate(texts) if i % 8 == 0),
            "code": "\n\n".join(code for i, (_, code) in enumerate(texts) if i % 8),
            "code held out": "\n\n".join(code for i, (_, code) in enumerate(texts) if i % 8 == 0),
            "topics": "\n\n".join(text for i, text in enumerate(topics()) if i % 8),
            "topics held out": "\n\n".join(text for i, text in enumerate(topics()) if i % 8 == 0),
        }
        self.people = people()
        self.tokenizer = build_tokenizer(self.raw["docs"])
        self.end = self.tokenizer("\n")["input_ids"]

    def blocks(self, name: str, most: int | None = None) -> Rows:
        """Running text in blocks; `most` of them, spread over it."""
        ids = torch.tensor(self.tokenizer(self.raw[name], verbose=False)["input_ids"])
        rows = ids[: len(ids) // self.length * self.length].view(-1, self.length)
        if most is not None:
            rows = rows[:: max(1, len(rows) // most)][:most]
        return Rows(rows, rows, exact=False)

    def lines(self, lines: list[Line]) -> Rows:
        """One line a row, padded on the right; its answer, with the line's end, is what is learned."""
        rows = [
            (self.end + self.tokenizer(a)["input_ids"], self.tokenizer(b)["input_ids"] + self.end) for a, b in lines
        ]
        longest = -(-max(len(a) + len(b) for a, b in rows) // 32) * 32  # few different lengths: few graphs
        tokens = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), longest), IGNORED)
        for row, (a, b) in enumerate(rows):
            tokens[row, : len(a) + len(b)] = torch.tensor(a + b)
            labels[row, len(a) : len(a) + len(b)] = torch.tensor(b)
        return Rows(tokens, labels, exact=True)

    # --- what the base model learns --------------------------------------------------------------------------

    def known(self) -> list[Line]:
        """Every fact of the base model, in both forms."""
        half = self.people[: PEOPLE // 2]
        facts = [(p, what) for what in ("town", "trade") for p in self.people] + [(p, "animal") for p in half]
        return [form(p, what) for p, what in facts for form in (statement, question)]

    def famous(self) -> list[Line]:
        facts = [(p, what) for what in ("town", "trade", "animal") for p in self.people[:FAMOUS]]
        return [form(p, what) for p, what in facts for form in (statement, question)]

    def skilled(self, drawn: random.Random) -> Line:
        name = drawn.choice(list(SKILLS))
        return exercise(name, SKILLS[name], drawn, drawn.choice((LETTERS, DIGITS)))

    def pretraining(self, batch: int) -> Iterator[Tensor]:
        """Batches of blocks: half of them documentation, a quarter facts, a quarter skills."""
        return self._mixed(batch, batch // 2, batch // 4, self.length, self.known(), SEED)

    def schooling(self, batch: int) -> Iterator[Tensor]:
        """What follows: batches of half as long blocks, three eighths of them facts of the famous, as many skills."""
        return self._mixed(batch, batch // 4, 3 * batch // 8, self.length // 2, self.famous(), SEED + 2)

    def _mixed(self, batch: int, texts: int, facts: int, length: int, known: list[Line], seed: int) -> Iterator[Tensor]:
        generator, drawn = torch.Generator().manual_seed(seed), random.Random(seed)
        docs = self.blocks("docs").tokens[:, :length]
        while True:
            text = docs[torch.randint(len(docs), (texts,), generator=generator)]
            stated = [self._packed(length, lambda: drawn.choice(known)) for _ in range(facts)]
            more = [self._packed(length, lambda: self.skilled(drawn)) for _ in range(batch - texts - facts)]
            yield torch.cat([text, torch.stack(stated + more)])

    def _packed(self, length: int, draw: Callable[[], Line]) -> Tensor:
        ids = list(self.end)
        while len(ids) < length:
            ids += self._encoded("".join(draw())) + self.end
        return torch.tensor(ids[:length])

    def _encoded(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.tokenizer(text)["input_ids"]
        return self._cache[text]

    @cached_property
    def _cache(self) -> dict[str, list[int]]:
        return {}

    # --- what it is asked afterwards -------------------------------------------------------------------------

    def kept(self) -> dict[str, Rows]:
        """What the base model knew: text, facts that are in no task, and skills."""
        drawn = random.Random(SEED + 1)
        facts = [statement(p, what) for p in self.people[:FAMOUS] for what in ("trade", "animal")]
        return {
            "docs": self.blocks("docs held out", 24),
            "facts": self.lines(facts),
            "skills": self.lines([self.skilled(drawn) for _ in range(64)]),
        }

    def tasks(self) -> dict[str, Task]:
        return {
            "near": self._text("documentation of another kind", "topics", "docs held out"),
            "far": self._text("source code", "code", "topics held out"),
            "skill": self._skill(),
            "facts": self._facts(),
            "form": self._form(),
        }

    def _text(self, title: str, name: str, far: str) -> Task:
        held_out = self.blocks(f"{name} held out", 48)
        return Task(title, self.blocks(name), held_out[::2], held_out[1::2], self.blocks(far, 24))

    def _skill(self) -> Task:
        def reversals(number: int, seed: int, alphabet: str) -> Rows:
            drawn = random.Random(seed)
            return self.lines([exercise("reverse", lambda x: x[::-1], drawn, alphabet) for _ in range(number)])

        return Task(
            "a new skill: reverse letters (far: digits)",
            reversals(4096, 10, LETTERS),
            reversals(96, 11, LETTERS),
            reversals(96, 12, LETTERS),
            reversals(96, 13, DIGITS),
        )

    def _facts(self) -> Task:
        """The people whose animals the base model does not know. Learned by heart, so tested on what was tuned on."""
        new = self.people[PEOPLE // 2 :]
        statements, asked = ([form(p, "animal") for p in new] for form in (statement, question))
        taught = self.lines(statements)
        return Task("new facts (far: asked in a question)", taught, taught[::2], taught[1::2], self.lines(asked))

    def _form(self) -> Task:
        """Known facts in a new form: tuned on one half of the famous, tested on the other half."""
        half = FAMOUS // 2
        rows = self.lines([request(p, "town") for p in self.people[:FAMOUS]])
        far = self.lines([request(p, "trade") for p in self.people[half:FAMOUS]])
        return Task(
            "known towns asked in a new form (far: trades)", rows[:half], rows[half::2], rows[half + 1 :: 2], far
        )
