"""The process that owns the model: reads requests from a socket, runs the engine's steps, sends tokens back.

Started by `client.EngineProcess` as `python -m mainspring.engine.server.engine_process DIRECTORY`. Its standard
input is a pipe that the parent keeps open and never writes to: its end means that the parent is gone.
"""

from __future__ import annotations

import gc
import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from mainspring.engine.parent_watch import end_with_parent
from mainspring.engine.server.protocol import (
    TO_ENGINE,
    TO_FRONTEND,
    Abort,
    Control,
    Controlled,
    Failed,
    FromEngine,
    Load,
    Outputs,
    Progress,
    Ready,
    Refused,
    Shutdown,
    Submit,
    ToEngine,
    decode_to_engine,
    encode,
)
from mainspring.errors import InvalidRequestError, MainspringError

if TYPE_CHECKING:
    from mainspring.engine.core import EngineCore
    from mainspring.engine.messages import EngineRequest
    from mainspring.engine.served_model import ServedModel

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0  # an idle engine looks so often whether the other ranks of its layout live


class Channel:
    """The engine's end of the two sockets in the private directory."""

    def __init__(self, directory: Path) -> None:
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._outbox = self._context.socket(zmq.PUSH)
        for socket in (self._inbox, self._outbox):
            # Nothing may be dropped or block: both sides read all the time, and requests are few.
            socket.set_hwm(0)
        self._inbox.bind(f"ipc://{directory / TO_ENGINE}")
        self._outbox.connect(f"ipc://{directory / TO_FRONTEND}")

    def send(self, message: FromEngine) -> None:
        """Queues a message to the frontend; never blocks."""
        self._outbox.send(encode(message))

    def receive(self, *, wait: bool, seconds: float | None = None) -> list[ToEngine]:
        """All messages that have come; with `wait`, at least one, or none after so many seconds."""
        messages: list[ToEngine] = []
        if wait and self._inbox.poll(None if seconds is None else round(1000 * seconds)):
            messages.append(decode_to_engine(self._inbox.recv()))
        while self._inbox.poll(0):
            messages.append(decode_to_engine(self._inbox.recv()))
        return messages

    def close(self) -> None:
        """Hands over what is queued (for two seconds at most) and closes the sockets."""
        self._inbox.close(linger=0)
        self._outbox.close(linger=2000)
        self._context.term()


class RequestLoop:
    """Runs the engine on what the frontend sends."""

    def __init__(self, core: EngineCore, channel: Channel) -> None:
        self._core = core
        self._channel = channel
        self._paused = False

    def run(self) -> None:
        """Until a Shutdown comes: one step after another while there is work, else waits."""
        while True:
            idle = not self._core.has_work()
            messages = self._channel.receive(wait=idle, seconds=_LOOK_SECONDS)
            if idle:
                self._core.check_ranks()
                if not messages:
                    continue
            for message in messages:
                match message:
                    case Submit(requests):
                        for request in requests:
                            self._add(request)
                    case Abort(request_ids):
                        for request_id in request_ids:
                            self._core.abort(request_id)
                    case Control():
                        self._control(message)
                    case Shutdown():
                        return
                    case Load():
                        raise RuntimeError("a second Load came; an engine process loads one model")
            outputs = self._core.step() if self._core.has_work() else []
            self._channel.send(Outputs(outputs, self._core.stats()))

    def _add(self, request: EngineRequest) -> None:
        try:
            self._core.add_request(request)
        except InvalidRequestError as error:
            kind = type(error).__name__
            self._channel.send(Refused(request.request_id, kind, str(error), error.param))

    def _control(self, message: Control) -> None:
        checksum, kind, text = None, None, ""
        try:
            match message.action:
                case "pause":
                    self._paused = True
                    self._core.pause()
                case "resume":
                    self._core.resume()
                    self._paused = False
                case "sleep":
                    self._sleep()
                case "wake":
                    self._wake()
                case "update_weights":
                    checksum = self._update_weights(message.path or "")
        except MainspringError as error:
            kind, text = type(error).__name__, str(error)
        self._channel.send(
            Controlled(message.control_id, self._paused, self._core.is_sleeping, checksum, kind, text)
        )

    def _sleep(self) -> None:
        if not self._core.is_sleeping:
            self._channel.send(Outputs(self._core.sleep(), self._core.stats()))

    def _wake(self) -> None:
        if self._core.is_sleeping:
            self._core.wake()
            if self._paused:
                self._core.pause()

    def _update_weights(self, path: str) -> str:
        """Copies weights from files. What runs is computed again with them, so that no text mixes old and new."""
        from mainspring.model.checkpoint import read_tensors

        tensors = read_tensors(path)
        was_sleeping = self._core.is_sleeping
        if self._core.stats().running:
            self._sleep()
        try:
            return self._core.update_weights(tensors)
        finally:
            if not was_sleeping:
                self._wake()


def load_core(message: Load, channel: Channel) -> EngineCore:
    """Loads the model and builds the engine on it; tells the frontend what it does."""
    # PyTorch was imported while the frontend still looked for the model.
    from mainspring.engine.core import EngineCore
    from mainspring.engine.ranks.layout import serving_layout
    from mainspring.engine.ranks.lead import LeadModel
    from mainspring.formats.tokenizer import Tokenizer
    from mainspring.model.checkpoint import load_model
    from mainspring.ops.threads import set_num_threads

    if message.num_threads is not None:
        set_num_threads(message.num_threads)
    model: ServedModel
    if message.layout is not None:
        channel.send(Progress(f"Starting the ranks ({message.layout}) and loading the weights"))
        layout = serving_layout(message.layout)
        assert layout is not None  # None for one process
        model = LeadModel(
            message.model,
            layout,
            device=message.device,
            dtype=message.dtype,
            numerics=message.numerics,
            num_threads=message.num_threads,
        )
    else:
        channel.send(Progress("Loading the weights"))
        model = load_model(
            message.quantized or message.model,
            device=message.device,
            dtype=message.dtype,
            numerics=message.numerics,
            quantized=message.quantized is not None,
        )
    channel.send(Progress("Preparing the engine"))
    # For structured outputs and bad words; the frontend has read the same files.
    core = EngineCore(model, message.config, tokenizer=Tokenizer.from_directory(message.model))
    dtype = str(model.dtype).removeprefix("torch.")
    # What is there now stays: the collector need not look at it again, which would hold the steps up.
    gc.collect()
    gc.freeze()
    where = str(model.device) if message.layout is None else f"{model.device.type} ({message.layout})"
    channel.send(Ready(core.limits, core.stats(), where, dtype, model.num_parameters))
    return core


def main(directory: Path) -> int:
    """Runs the engine process; returns its exit status."""
    # Ctrl-C and a service manager signal the whole group; the frontend decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent(directory)
    channel = Channel(directory)
    try:
        # The slow import, before the first message: the frontend looks for the model meanwhile.
        import mainspring.engine.core
        import mainspring.model.checkpoint  # noqa: F401 - see above

        first = channel.receive(wait=True)[0]
        if isinstance(first, Load):
            core = load_core(first, channel)
            try:
                RequestLoop(core, channel).run()
            finally:
                core.close()
        return 0
    except MainspringError as error:
        channel.send(Failed(type(error).__name__, str(error)))
        return 1
    except Exception as error:
        log.exception("The engine process ends because of an error")
        channel.send(Failed(type(error).__name__, str(error)))
        return 1
    finally:
        channel.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="engine: %(levelname)s %(message)s")
    sys.exit(main(Path(sys.argv[1])))
