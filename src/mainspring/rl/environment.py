"""Conversations of several turns: what an answer brings about, and an environment with one real tool, a calculator."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from mainspring.rl.prompts import Prompt
from mainspring.rl.verifiers import same_number


@dataclass(frozen=True)
class Turn:
    """What follows an answer."""

    text: str = ""
    """What the policy reads next, a template's marks included; it is never learnt from."""
    done: bool = False
    reward: float = 0.0
    """Of this answer; a conversation's reward is the sum over its turns."""


class Environment(Protocol):
    """One conversation's world. It must be a function of what it is told: a carried one is told all of it again."""

    def reset(self, prompt: Prompt) -> None:
        """A conversation begins. Whatever this or `step` raises drops the sample and is counted; `environment_worker`
        sees to it that they return in time."""
        ...

    def step(self, answer: str) -> Turn:
        """The policy has ended a turn with this text."""
        ...


_OPERATORS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_CALL = re.compile(r"calc\(([^\n]*)\)\s*$")
_LONGEST = 200  # characters of an expression


class Calculator:
    """An answer that ends with calc(EXPRESSION) is answered by the result; any other is the final one, and rewarded.

    The reward is `same_number`'s, of the last answer and the prompt's reference.
    """

    def __init__(self, most_calls: int = 8) -> None:
        self._most_calls = most_calls
        self._calls = 0
        self._prompt = Prompt((), "", "")

    def reset(self, prompt: Prompt) -> None:
        self._prompt, self._calls = prompt, 0

    def step(self, answer: str) -> Turn:
        call = _CALL.search(answer)
        if call is None or self._calls == self._most_calls:
            return Turn(done=True, reward=same_number(self._prompt.text, answer, self._prompt.reference))
        self._calls += 1
        return Turn(text=f"={calculate(call[1])}\n")


def calculate(expression: str) -> str:
    """The exact value of + - * / over decimal numbers, or "error: " and why: a model reads either."""
    if len(expression) > _LONGEST:
        return f"error: longer than {_LONGEST} characters"
    try:
        return str(_value(ast.parse(expression.strip(), mode="eval").body))
    except ZeroDivisionError:
        return "error: division by zero"
    except (SyntaxError, ValueError, RecursionError):
        return "error: not an expression of numbers and + - * /"


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return Fraction(str(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=kind, right=right) if type(kind) in _OPERATORS:
            return _OPERATORS[type(kind)](_value(left), _value(right))
    raise ValueError(ast.dump(node))
