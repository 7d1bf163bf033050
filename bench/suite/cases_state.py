"""How far a worker is with its cases, as its parent process knows it."""

from typing import Any

_ATTEMPTS = 3  # at a case, each without the provider that broke the one before


class CasesState:
    """How far the cases are, across processes that may break."""

    def __init__(self) -> None:
        self._cases: list[dict[str, Any]] = []
        self._planned: list[str] | None = None
        self._current: str | None = None
        self._provider: str | None = None
        self._without: dict[str, dict[str, str]] = {}  # by case: who broke it
        self._uncaptured: dict[str, dict[str, str]] = {}  # by op: whose capture failed
        self._again = False

    @property
    def finished(self) -> bool:
        return self._planned is not None and not self.missing()

    def missing(self) -> list[str]:
        done = {case["case"] for case in self._cases}
        return [name for name in self._planned or [] if name not in done]

    def job(self) -> dict[str, Any]:
        return {
            "done": [case["case"] for case in self._cases],
            "without": self._without,
            "uncaptured": self._uncaptured,
        }

    def take(self, message: dict[str, Any]) -> None:
        if "cases" in message:
            self._planned = message["cases"]
        elif "begin" in message:
            self._current, self._provider = message["begin"], None
        elif "phase" in message:
            kind, _, name = message["phase"].partition(" ")
            self._provider = name if kind == "provider" else None
        elif "case" in message:
            self._cases.append(message["case"])
            self._current = None
        elif "uncaptured" in message:
            op = message["uncaptured"].pop("op")
            self._uncaptured.setdefault(op, {}).update(message["uncaptured"])
            self._again = True

    def broken(self, reason: str) -> dict[str, Any] | None:
        """The process broke: the record of a case to give up, empty to try again without a peer.

        None where no case is to blame.
        """
        name, provider = self._current, self._provider
        if name is None:
            return None
        self._current = None
        if self._again:
            self._again = False
            return {}
        without = self._without.setdefault(name, {})
        if provider not in (None, "ours") and len(without) < _ATTEMPTS:
            without[provider] = reason
            return {}
        record = {"case": name, "status": "failed", "reason": f"{provider or 'timing'}: {reason}"}
        self._cases.append(record)
        return record
