"""What `vtoken.evals.quality.cluster` uses of Ray, in one process: calls run when they are waited for, and actors can
be made to die."""

from __future__ import annotations

from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Ray(ModuleType):
    """Attributes:
    deadly: called with an actor's number, the method's name and its arguments before it runs; true kills the actor.
    late: numbers of actors that get no place.
    """

    def __init__(self, cpus: int = 4, gpus: int = 0) -> None:
        super().__init__("ray")
        self.__spec__ = ModuleSpec("ray", None)
        self.machine = {"CPU": float(cpus), "GPU": float(gpus)}
        self.deadly: Callable[..., bool] = lambda number, name, *args: False
        self.late: set[int] = set()
        self.asked_for: dict[str, Any] = {}
        self.hired: list[Any] = []
        self.calls: list[tuple[int, str, Any]] = []
        self.killed: set[int] = set()
        self.running = False
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def is_initialized(self) -> bool:
        return self.running

    def init(self, address: str | None, **options: Any) -> None:
        if address == "nowhere":
            raise ConnectionError("no such host")
        self.running = True

    def shutdown(self) -> None:
        self.running = False

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": self.machine}, {"Alive": False, "Resources": {"CPU": 99.0}}]

    def remote(self, **options: Any) -> Callable[[type], Any]:
        self.asked_for = options

        def actors(kind: type) -> Any:
            def hire(*args: Any) -> Any:
                number, own = len(self.hired), kind(*args)

                def method(name: str) -> Any:
                    return SimpleNamespace(remote=lambda *given: (number, name, getattr(own, name), given))

                self.hired.append(SimpleNamespace(number=number, ready=method("ready"), ask=method("ask")))
                return self.hired[-1]

            return SimpleNamespace(remote=hire)

        return actors

    def wait(self, refs: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        # The youngest first: nobody may count on an order.
        return [next(ref for ref in reversed(refs) if ref[0] not in self.late)], []

    def get(self, ref: Any) -> Any:
        number, name, function, given = ref
        assert number not in self.killed
        self.calls.append((number, name, *given))
        if self.deadly(number, name, *given):
            self.killed.add(number)
            raise RayError("the actor died")
        try:
            return function(*given)
        except Exception as error:
            raise RayTaskError(error) from error

    def kill(self, actor: Any) -> None:
        self.killed.add(actor.number)
