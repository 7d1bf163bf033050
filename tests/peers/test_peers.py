"""The table of others' tests and what makes it, without the network and without their tests."""

import io
import json
import re
import tarfile
from pathlib import Path

import pytest

from tests.peers import __main__ as command
from tests.peers import outcomes, reasons, sources, table, vocabulary

pytest_plugins = ["pytester"]


def pack(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, mode: int = 0o644) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.size = kind, mode, int(kind == tarfile.REGTYPE)
    info.linkname = "/etc/passwd"
    return info


def test_the_tests_alone_are_unpacked(tmp_path: Path) -> None:
    archive = pack(
        tmp_path / "a.tar.gz",
        member("a-1/setup.py"),
        member("a-1/tests", tarfile.DIRTYPE, 0o000),
        member("a-1/tests/test_a.py", mode=0o4777),
    )
    sources.unpack(archive, tmp_path / "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files == [tmp_path / "out/a-1/tests/test_a.py"]
    assert files[0].stat().st_mode & 0o7022 == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a-1/tests/../../../outside", tarfile.REGTYPE),
        ("a-1/tests/link", tarfile.SYMTYPE),
        ("a-1/tests/link", tarfile.LNKTYPE),
        ("a-1/tests/device", tarfile.CHRTYPE),
    ],
)
def test_what_is_no_file_of_its_own_is_refused(tmp_path: Path, name: str, kind: bytes) -> None:
    archive = pack(tmp_path / "a.tar.gz", member("a-1/tests/test_a.py"), member(name, kind))
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        sources.unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_archive_of_the_same_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources.Source("tiktoken", "0.14.0", sources.TIKTOKEN.sha256)
    pack(tmp_path / "tiktoken-0.14.0.tar.gz", member("tiktoken-0.14.0/tests/test_a.py"))
    monkeypatch.setattr(sources, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"tiktoken 0\.14\.0(.|\n)*HASHES"):
        sources.fetch(source)
    assert not source.folder.exists()


def test_the_tests_are_those_of_the_tested_versions() -> None:
    pins = (sources.ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition(";")[0] for line in pins}
    for source in (sources.TRANSFORMERS, sources.TIKTOKEN):
        assert f"{source.name}=={source.version}" in pinned


def test_the_vocabulary_of_an_earlier_run_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vocabulary, "FOLDER", tmp_path)
    monkeypatch.setattr(command, "SOURCES", ())

    def run(which: str) -> table.Outcomes:
        assert which == "ours"
        assert not tmp_path.exists()
        return table.read()[which]

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr("sys.argv", ["peers"])
    command.main()
    assert capsys.readouterr().out == "others' tests: 0 worse than the table, 0 better\n"


def test_worse_and_better() -> None:
    kinds = ("passed", "skipped: why", "failed: why", None)
    old = {f"{i}{j}": a for i, a in enumerate(kinds) for j, _ in enumerate(kinds) if a}
    new = {f"{i}{j}": b for i, _ in enumerate(kinds) for j, b in enumerate(kinds) if b}
    worse, better = table.changes({"s": old}, {"s": new})
    assert [line.split()[1] for line in worse] == ["01:", "02:", "03:", "12:", "13:", "23:", "32:"]
    assert [line.split()[1] for line in better] == ["10:", "20:", "21:", "30:", "31:"]
    assert table.changes({"s": old}, {"s": old}) == ([], [])
    assert len(table.changes({"s": {"t": "passed"}}, {})[0]) == 1


def test_outcomes_of_tests_and_subtests(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(
        suite_some="""
        import unittest

        class Some(unittest.TestCase):
            def test_passes(self):
                with self.subTest("a"):
                    pass

            def test_skips(self):
                self.skipTest("no reason")

            def test_fails(self):
                assert 1 == 2, "at 0x7f00 in /tmp/some/where"

            def test_one_subtest_fails(self):
                for i in range(3):
                    with self.subTest(i=i):
                        if i == 0:
                            self.skipTest("odd")
                        assert i < 2, "too large"

            def test_one_subtest_skips(self):
                for i in range(2):
                    with self.subTest(i=i):
                        if i == 1:
                            self.skipTest("odd")

            def test_all_subtests_skip(self):
                for i in range(2):
                    with self.subTest(i=i):
                        self.skipTest("odd")

        class Broken(unittest.TestCase):
            @classmethod
            def setUpClass(cls):
                raise RuntimeError("not set up")

            def test_never_runs(self):
                pass
        """
    )
    output = pytester.path / "outcomes.json"
    monkeypatch.setenv(outcomes.OUTPUT, str(output))
    pytester.runpytest_inprocess("-p", "tests.peers.outcomes", "suite_some.py")
    found = json.loads(output.read_text())
    assert found == {
        "some": {
            "Some::test_passes": "passed",
            "Some::test_skips": "skipped: no reason",
            "Some::test_fails": "failed: AssertionError: at 0x... in ...",
            "Some::test_one_subtest_fails": "failed: AssertionError: too large",
            "Some::test_one_subtest_skips": "passed",
            "Some::test_all_subtests_skip": "skipped: odd",
            "Broken::test_never_runs": "failed: RuntimeError: not set up",
        }
    }


def test_the_page_is_of_the_results_and_gives_every_reason() -> None:
    stored = table.read()
    versions = {s.name: s.version for s in (sources.TRANSFORMERS, sources.TIKTOKEN)}
    assert table.PAGE.read_text() == table.page(stored["ours"], stored["control"], versions)
    with pytest.raises(LookupError, match="reasons"):
        table.reason_for("models", "GPT2ModelTest::test_of_nobody")


def test_no_reason_is_without_a_failure() -> None:
    failed = [
        (suite, test)
        for suite, tests in table.read()["ours"].items()
        for test, outcome in tests.items()
        if outcomes.kind(outcome) == "failed"
    ]
    used = {table.reason_for(suite, test) for suite, test in failed}
    assert used == {reason for _, _, reason in reasons.REASONS}
