"""The docstrings of this package as Markdown: a line for each argument, and examples as blocks of code."""

import re

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
RAISES = re.compile(r"(?<=\.)\s+(?=Raises )")


def listed(text: str, names: list[str]) -> str:
    """`first: what it is. second: what it is.` as the items of a list, for the names that there are."""
    one = "|".join(map(re.escape, names))
    item = re.compile(rf"(?:^|(?<=[.;])\s)\s*((?:{one})(?:, (?:{one}))*): ", re.MULTILINE)
    return RAISES.sub("\n\n", item.sub(r"\n\n- `\1`: ", text)) if names else text


class Markdown(griffe.Extension):
    def on_function(self, *, func: griffe.Function, **kwargs) -> None:
        self.change(func, [p.name for p in func.parameters])

    def on_class(self, *, cls: griffe.Class, **kwargs) -> None:
        self.change(cls, [*cls.attributes, *[p.name for p in cls.parameters]])

    def change(self, obj: griffe.Object, names: list[str]) -> None:
        if obj.docstring:
            # what stands before the first example is prose
            prose, *examples = re.split(r"^(?=>>> )", obj.docstring.value, maxsplit=1, flags=re.MULTILINE)
            code = [EXAMPLE.sub(lambda match: f"```pycon\n{match.group(0)}\n```", example) for example in examples]
            obj.docstring.value = "".join([listed(prose, sorted(names, key=len, reverse=True)), *code])
