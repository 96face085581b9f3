"""One conversation while it is written: its tokens, who wrote them, and the environment it is held with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mainspring.rl.environment import Environment
from mainspring.rl.prompts import Prompt, Texts
from mainspring.rl.rewards import Completion
from mainspring.rl.trajectories import Trajectory


@dataclass(frozen=True)
class Written:
    """What of a conversation must be kept to go on with it elsewhere; plain values."""

    prompt: int
    seed: int
    tokens: tuple[int, ...]
    """The prompt's included."""
    written: tuple[bool, ...]
    log_probs: tuple[float, ...]
    versions: tuple[int, ...]
    done: bool
    finished: bool
    failed: bool


class Conversation:
    """Mutable; owned by `Rollouts`.

    seed: fixes, with a token's place, the random numbers it is drawn by. done: nothing more is to be written;
    finished: it ended by itself; failed: its environment raised, and there is no reward. One that is new calls `begin`,
    one that was kept `replay`.
    """

    def __init__(
        self, index: int, prompt: Prompt, seed: int, environment: Environment | None, texts: Texts
    ) -> None:
        self.seed = seed
        self.tokens = list(prompt.tokens)
        self.done = self.finished = self.failed = False
        self.reward = 0.0
        self.turns = 0
        self._index = index
        self.prompt = prompt
        self._environment = environment
        self._texts = texts
        self._marks = [False] * len(prompt.tokens)
        self._log_probs: list[float] = []
        self._versions: list[int] = []
        self._turn_began = len(prompt.tokens)

    def begin(self) -> None:
        """Tells the environment of it, if there is one. Raises what that raises."""
        if self._environment is not None:
            self._environment.reset(self.prompt)

    @property
    def num_written(self) -> int:
        return len(self._log_probs)

    @property
    def written(self) -> Written:
        return Written(
            self._index,
            self.seed,
            tuple(self.tokens),
            tuple(self._marks),
            tuple(self._log_probs),
            tuple(self._versions),
            self.done,
            self.finished,
            self.failed,
        )

    def take(self, tokens: Sequence[int], log_probs: Sequence[float], version: int) -> None:
        """The policy has written these."""
        self.tokens += tokens
        self._marks += [True] * len(tokens)
        self._log_probs += log_probs
        self._versions += [version] * len(tokens)

    def turn_over(self) -> None:
        """The policy has ended its turn: the environment answers, if there is one. Raises what that raises."""
        self.turns += 1
        if self._environment is None:
            self.end(finished=True)
            return
        turn = self._environment.step(self._texts.decode(self.tokens[self._turn_began :]))
        self.reward += turn.reward
        if turn.done:
            self.end(finished=True)
            return
        told = self._texts.encode(turn.text)
        self.tokens += told
        self._marks += [False] * len(told)
        self._turn_began = len(self.tokens)

    def end(self, *, finished: bool) -> None:
        self.done, self.finished = True, finished

    def fail(self) -> None:
        self.done = self.failed = True

    def replay(self, kept: Written) -> None:
        """Becomes the one that was kept, whatever it was; the environment is told again what it was told."""
        first = len(self.prompt.tokens)
        self.reward, self.turns, self._turn_began = 0.0, 0, first
        if self._environment is not None:
            self._environment.reset(self.prompt)
        runs = _runs(kept.written, first)
        for start, stop in runs:
            # What was cut off, by a slice or for good, was never told to the environment.
            ended = stop < len(kept.tokens) or kept.finished or kept.tokens[stop - 1] in self._texts.ends
            if self._environment is not None and ended and not kept.failed:
                turn = self._environment.step(self._texts.decode(kept.tokens[start:stop]))
                self.reward += turn.reward
            self.turns += ended
            self._turn_began = start
        if runs and runs[-1][1] < len(kept.tokens):
            self._turn_began = len(kept.tokens)
        self.tokens, self._marks = list(kept.tokens), list(kept.written)
        self._log_probs, self._versions = list(kept.log_probs), list(kept.versions)
        self.done, self.finished, self.failed = kept.done, kept.finished, kept.failed

    def completion(self) -> Completion:
        """What is to be rewarded: all that the policy wrote, as one text."""
        answer = [token for token, mine in zip(self.tokens, self._marks, strict=True) if mine]
        return Completion(
            self.prompt.text, self._texts.decode(answer), self.prompt.reference, tuple(self.tokens)
        )

    def trajectory(self, reward: float) -> Trajectory:
        return Trajectory(
            self._index,
            tuple(self.tokens),
            tuple(self._marks),
            tuple(self._log_probs),
            tuple(self._versions),
            reward,
            self.finished,
        )


def _runs(written: Sequence[bool], first: int) -> list[tuple[int, int]]:
    """(start, stop) of each stretch of written tokens."""
    runs: list[tuple[int, int]] = []
    start = None
    for i in range(first, len(written) + 1):
        inside = i < len(written) and written[i]
        if inside and start is None:
            start = i
        elif not inside and start is not None:
            runs.append((start, i))
            start = None
    return runs
