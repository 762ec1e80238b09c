"""Runs that are killed, extended or written to a full disk lose nothing, at whichever file operation it happens."""

import errno
import json
import os
import resource
import shutil
import subprocess

import pytest
import torch
from folders import assert_same_folders, contents, count_changes, full_from, killed_at

from spafl.cli import main
from spafl.client_results import results_path
from spafl.errors import UserError, WriteError
from spafl.simulation import RunFolder, run, sample_clients

THREE_ROUNDS = {"simulation": {"checkpoint_every": 1, "keep_checkpoints": 2, "store": "file"}}


@pytest.fixture(scope="module")
def three_rounds(tmp_path_factory):
    """``(configuration, folder)`` of a whole run of three rounds."""
    from small_problem import SMALL

    from spafl.config import deep_merge, resolve_config

    config = resolve_config(deep_merge(SMALL, THREE_ROUNDS))
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(config, folder, quiet=True)
    return config, folder


def resumed(config, folder):
    """Continue where there is something to continue, else start anew; as a user would."""
    run(config, folder, resume=(folder / "config.toml").exists(), quiet=True)


# -- killed


@pytest.mark.parametrize("torn", [pytest.param(False, marks=pytest.mark.slow), True], ids=["between", "torn"])
@pytest.mark.parametrize("share", [11, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_kill_at_any_file_operation_loses_nothing(three_rounds, tmp_path, share, torn):
    config, whole = three_rounds
    count = count_changes(tmp_path / "count", lambda: run(config, tmp_path / "count", quiet=True))
    assert count >= 48
    for number in range(1 + (share > 1) * (2 + torn), count + 1, share):
        folder = tmp_path / str(number)
        assert killed_at(folder, lambda f=folder: run(config, f, quiet=True), number, torn), number
        resumed(config, folder)
        assert_same_folders(folder, whole)
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("torn", [False, True], ids=["between", "torn"])
def test_a_kill_at_any_file_operation_of_an_extension_loses_nothing(three_rounds, tmp_path, torn):
    config, whole = three_rounds
    run(config.model_copy(update={"rounds": 2}), tmp_path / "two", quiet=True)

    def extended(folder):
        shutil.copytree(tmp_path / "two", folder)
        return lambda: run(config, folder, resume=True, quiet=True)

    count = count_changes(tmp_path / "count", extended(tmp_path / "count"))
    for number in range(1, count + 1):
        folder = tmp_path / str(number)
        assert killed_at(folder, extended(folder), number, torn), number
        # Neither the old length nor the new one is out of reach.
        if number % 2:
            resumed(config, folder)
        else:
            done = len((folder / "metrics.jsonl").read_bytes().splitlines())
            resumed(config.model_copy(update={"rounds": min(3, max(2, done))}), folder)
            resumed(config, folder)
        assert_same_folders(folder, whole)
        shutil.rmtree(folder)


# -- a full disk


@pytest.mark.parametrize("share", [13, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_disk_that_fills_up_at_any_file_operation_loses_nothing(three_rounds, tmp_path, share):
    config, whole = three_rounds
    count = count_changes(tmp_path / "count", lambda: run(config, tmp_path / "count", quiet=True))
    for number in range(1 + (share > 1) * 3, count + 1, share):
        folder = tmp_path / str(number)
        try:
            full_from(folder, lambda f=folder: run(config, f, quiet=True), number)
        except WriteError as error:
            assert "No space left on device" in str(error) and str(folder) in str(error) and "\n" not in str(error)
        else:  # only files were left to be removed
            assert (folder / "summary.json").exists(), number
            shutil.rmtree(folder)
            continue
        assert not list(folder.glob("**/*.tmp")) and not (folder / ".lock").exists(), number
        resumed(config, folder)
        assert_same_folders(folder, whole)
        shutil.rmtree(folder)


def test_a_disk_that_is_full_before_an_extension_changes_nothing(three_rounds, tmp_path):
    config, whole = three_rounds
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for error in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG):
        with pytest.raises(WriteError) as caught:
            longer = config.model_copy(update={"rounds": 5})
            full_from(folder, lambda c=longer: run(c, folder, resume=True, quiet=True), 1, error)
        assert os.strerror(error) in str(caught.value)
    assert_same_folders(folder, whole)


@pytest.mark.parametrize("limit", [1000, 2000, 100_000, 1_800_000, 4_000_000])
def test_a_limit_on_the_size_of_files_is_said_in_one_line(three_rounds, tmp_path, capfd, limit):
    """The writes themselves fail here, not the opening of a file."""
    config, whole = three_rounds
    (tmp_path / "c.toml").write_text(config.to_toml())
    folder = tmp_path / "run"
    child = os.fork()
    if child == 0:
        code = 99
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            code = main(["run", str(tmp_path / "c.toml"), "--out", str(folder), "--no-report", "--quiet"])
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "File too large" in error and str(folder) in error
    resumed(config, folder)
    assert_same_folders(folder, whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_small_disk_is_said_in_one_line(three_rounds, tmp_path, capfd, workers):
    config, whole = three_rounds
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        (tmp_path / "c.toml").write_text(config.to_toml())
        arguments = ["run", str(tmp_path / "c.toml"), "--out", str(disk / "run"), "--no-report", "--quiet"]
        arguments += ["--set", f"simulation.workers={workers}"]
        assert main(arguments) == 3
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and "No space left on device" in error
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        again = [*arguments, "--resume"] if (disk / "run" / "config.toml").exists() else arguments
        assert main(again) == 0
        expected = contents(whole)
        found = contents(disk / "run")
        del expected["config.toml"], found["config.toml"]
        assert found == expected
    finally:
        subprocess.run(["umount", disk], check=True)


# -- extended


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": {"collapse_floor": 0.9, "penalty": 3}, "training": {"lr": 0.05}, "evaluation": {"every": 100}},
        {"algorithm": {"variant": "cifar10", "collapse_floor": 0.9, "penalty": 3},
         "simulation": {"checkpoint_every": 4, "keep_checkpoints": 5}, "evaluation": {"every": 4}},
    ],
    ids=["guard", "announcements"],
)  # fmt: skip
def test_an_extended_run_is_the_long_run(small_config, tmp_path, changes):
    run(small_config(rounds=6, **changes), tmp_path / "long", quiet=True)
    run(small_config(rounds=3, **changes), tmp_path / "run", quiet=True)
    run(small_config(rounds=6, **changes), tmp_path / "run", resume=True, quiet=True)
    assert_same_folders(tmp_path / "run", tmp_path / "long")


def test_an_extended_run_forgets_what_only_its_last_round_measured(small_config, tmp_path):
    """Accuracies on training data of clients, and results of rounds that a long run does not evaluate."""
    for every in (1, 2):
        folder, changes = tmp_path / f"run{every}", {"evaluation": {"every": every, "clients": 2}}
        run(small_config(rounds=1, **changes), folder, quiet=True)
        assert json.loads(results_path(folder, 0).read_text().splitlines()[0])["train_accuracy"] is not None
        run(small_config(rounds=2, **changes), folder, resume=True, quiet=True)
        run(small_config(rounds=2, **changes), tmp_path / f"long{every}", quiet=True)
        assert_same_folders(folder, tmp_path / f"long{every}")


def test_fewer_rounds_than_done_are_refused_and_nothing_changes(three_rounds, tmp_path):
    config, whole = three_rounds
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(UserError, match="holds 3 finished rounds; rounds must be at least that, got 1"):
        run(config.model_copy(update={"rounds": 1}), tmp_path / "run", resume=True)
    assert_same_folders(tmp_path / "run", whole)


def test_a_run_is_continued_by_its_folder_alone(three_rounds, tmp_path, capsys):
    config, whole = three_rounds
    two = config.model_copy(update={"rounds": 2, "name": "another name"})
    run(two, tmp_path / "run", quiet=True)
    arguments = ["run", "--resume", str(tmp_path / "run"), "--no-report", "--quiet"]
    assert main([*arguments, "--set", "rounds=3", "--set", "name=small"]) == 0
    assert_same_folders(tmp_path / "run", whole)
    assert main([*arguments, "--out", str(tmp_path / "elsewhere")]) == 2
    assert "continued in its own folder" in capsys.readouterr().err
    assert main(["run", "--resume", str(tmp_path)]) == 2
    assert "holds no run to resume" in capsys.readouterr().err


# -- damaged


def raw(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_damaged_checkpoint_is_named_and_its_rounds_are_repeated(three_rounds, tmp_path, capsys):
    config, whole = three_rounds
    shutil.copytree(whole, tmp_path / "run")
    server = tmp_path / "run" / "checkpoints" / "round-000002" / "server.safetensors"
    server.write_bytes(server.read_bytes()[:-1] + b"?")
    run(config, tmp_path / "run", resume=True, quiet=True)
    said = capsys.readouterr().err
    assert "round-000002 server.safetensors is corrupt" in said and "rounds 2 to 2 are repeated" in said
    assert_same_folders(tmp_path / "run", whole)


@pytest.mark.parametrize("damage", ["binary", "numbers", "lists", "cut", "folder", "gone"])
def test_damaged_metrics_are_repeated_or_refused_in_a_line(three_rounds, tmp_path, damage):
    config, whole = three_rounds
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    good = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "cut":  # rounds 0 and 1 are there, so the checkpoint of round 1 can be continued
        path.write_bytes(b"".join(good.splitlines(keepends=True)[:2]))
        run(config, tmp_path / "run", resume=True, quiet=True)
        assert_same_folders(tmp_path / "run", whole)
        return
    elif damage != "gone":
        path.write_bytes({"binary": b"\xff\x00\x80", "numbers": b"5\n6\n", "lists": b"[1]\n"}[damage])
    before = raw(tmp_path / "run")
    with pytest.raises(UserError, match="the metrics end before the first round"):
        run(config, tmp_path / "run", resume=True, quiet=True)
    assert raw(tmp_path / "run") == before


def test_a_summary_never_outlives_its_run(three_rounds, tmp_path):
    config, whole = three_rounds
    shutil.copytree(whole, tmp_path / "run")
    longer = config.model_copy(update={"rounds": 5})
    count = count_changes(tmp_path / "run", lambda: run(longer, tmp_path / "run", resume=True, quiet=True))
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(whole, tmp_path / "run")
    assert killed_at(
        tmp_path / "run", lambda: run(longer, tmp_path / "run", resume=True, quiet=True), count - 12, False
    )
    assert not (tmp_path / "run" / "summary.json").exists()
    assert json.loads((whole / "summary.json").read_text())["rounds"] == 3


@pytest.mark.parametrize(
    "content", [None, b"", b"\xff", b"5", b"{}", b'{"classes": 0, "image": [1, 28, 28]}', b'{"classes": 2, "image": 3}']
)
def test_a_damaged_partition_is_said_in_one_line(three_rounds, tmp_path, capsys, content):
    _, whole = three_rounds
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "partition.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    for command in (["export", str(tmp_path / "run"), "--client", "0"], ["report", str(tmp_path / "run")]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(path) in error


def test_an_export_is_the_client_that_was_tested(small_config, tmp_path):
    """It has heard what was announced since it trained."""
    from spafl.export import client_model
    from spafl.simulation.problem import build_problem

    config = small_config(algorithm={"variant": "cifar10", "penalty": 0.5}, sampling={"clients_per_round": 2})
    config = config.model_copy(update={"rounds": 4})
    run(config, tmp_path / "run", quiet=True)
    problem = build_problem(config)
    accuracies = [json.loads(text)["accuracy"] for text in results_path(tmp_path / "run", 3).read_text().splitlines()]
    trained = {k for r in range(4) for k in sample_clients(config, r)}
    for k in sorted(trained):
        model, _ = client_model(tmp_path / "run", k)
        chosen = problem.parts.test[k]
        x = problem.dataset.transform(torch.from_numpy(problem.dataset.test_x[chosen]), torch.float32, None)
        right = model(x).argmax(1) == torch.from_numpy(problem.dataset.test_y[chosen])
        assert right.float().mean().item() == pytest.approx(accuracies[k])
    if missing := set(range(5)) - trained:
        with pytest.raises(UserError, match="has not trained"):
            client_model(tmp_path / "run", missing.pop())


def test_an_export_into_a_file_is_refused_in_one_line(three_rounds, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["export", str(three_rounds[1]), "--client", "0", "--out", str(tmp_path / "file")]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "File exists" in error


# -- the lock


def test_whoever_waits_for_the_lock_of_a_folder_never_shares_it(tmp_path):
    """The file that is locked may have lost its name meanwhile: then it says nothing about the folder."""
    import fcntl

    (tmp_path / "keep").mkdir()
    folder = tmp_path / "run"
    first = RunFolder(folder, resume=False)
    (folder / "config.toml").write_text("")
    late = (folder / ".lock").open("w")  # a second process, before the first one lets go
    first.close()
    fcntl.flock(late, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and after: it holds a file without a name
    third = RunFolder(folder, resume=True)
    with pytest.raises(UserError, match="in use by another process"):
        RunFolder(folder, resume=True)
    third.close()
    late.close()


@pytest.mark.parametrize("path", ["x" * 300, "nul\0nul"])
def test_paths_that_cannot_be_are_refused_in_a_line(small_config, tmp_path, path):
    with pytest.raises(UserError, match="cannot be used") as caught:
        run(small_config(), tmp_path / path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("left", [".scratch", ".config.toml.tmp", "config.toml.tmp", ".lock"])
def test_what_a_killed_start_left_behind_is_no_obstacle(small_config, tmp_path, left):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / left).mkdir() if left == ".scratch" else (tmp_path / "run" / left).write_text("x")
    RunFolder(tmp_path / "run", resume=False).close()
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "mine").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        RunFolder(tmp_path / "run", resume=False)
    assert (tmp_path / "run" / "mine").exists()
