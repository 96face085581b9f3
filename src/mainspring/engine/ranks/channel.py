"""What rank 0 tells the others of each step: a few integers, broadcast between the processes' hosts.

All ranks then enter the same collectives in the same order. Token ids and block tables do not come this way: they lie
on the device and travel there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

_WORDS = 512  # of the first broadcast; longer messages take a second one


class Op(IntEnum):
    """What the ranks are to do."""

    LOAD = 1
    ALLOCATE = 2
    FREE = 3
    FORWARD = 4
    LOGITS = 5
    COPY_BLOCKS = 6
    REPLAY = 7
    FREE_MEMORY = 8
    COPY_WEIGHT = 9
    CHECKSUM = 10
    SCORE = 11
    ADAPTERS = 12
    STOP = 13


@dataclass(frozen=True)
class Message:
    """An order and its integers."""

    op: Op
    words: tuple[int, ...] = ()

    @property
    def value(self) -> Any:
        """What `with_json` has put in."""
        count, *words = self.words
        return json.loads(np.array(words, dtype=np.int64).tobytes()[:count])

    @staticmethod
    def with_json(op: Op, value: Any) -> Message:
        """An order with a value that JSON can say."""
        text = json.dumps(value).encode()
        padded = text + b" " * (-len(text) % 8)
        return Message(op, (len(text), *np.frombuffer(padded, dtype=np.int64).tolist()))


class Channel:
    """From rank 0 to all others, in order. `group` is one of gloo, whose timeout is as long as an engine may idle."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group

    def send(self, op: Op, words: Sequence[int] = ()) -> None:
        """On rank 0. RuntimeError if a rank is gone."""
        self.post(Message(op, tuple(words)))

    def post(self, message: Message) -> None:
        """As `send`."""
        first = torch.zeros(_WORDS, dtype=torch.int64)
        words = torch.tensor(message.words, dtype=torch.int64)
        inline = min(len(words), _WORDS - 2)
        first[0], first[1] = int(message.op), len(words)
        first[2 : 2 + inline] = words[:inline]
        dist.broadcast(first, src=0, group=self._group)
        if len(words) > inline:
            dist.broadcast(words[inline:].clone(), src=0, group=self._group)

    def receive(self) -> Message:
        """On the others: the next order. RuntimeError if rank 0 is gone."""
        first = torch.zeros(_WORDS, dtype=torch.int64)
        dist.broadcast(first, src=0, group=self._group)
        op, count, *words = first.tolist()
        inline = min(count, _WORDS - 2)
        words = words[:inline]
        if count > inline:
            rest = torch.zeros(count - inline, dtype=torch.int64)
            dist.broadcast(rest, src=0, group=self._group)
            words += rest.tolist()
        return Message(Op(op), tuple(words))
