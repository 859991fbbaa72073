"""How ensure-model fails: exit status, last word, and what it never says."""

from __future__ import annotations

import grpc
import pytest
from modelcache.reasons import TABLE, Reason
from modelcache.v1 import cache_pb2

from tests.unit.client.fake_daemon import details, progress, refuse, until_over

# A daemon that shuts down is not a failure: it is waited for (test_ensure_waits.py).
FINAL = [reason for reason in Reason if reason is not Reason.SHUTTING_DOWN]
TOKEN = "hf_never_seen"


def refusing(reason, **more):
    def on_ensure(_request, context):
        yield progress()
        refuse(context, reason, **more)

    return on_ensure


@pytest.mark.parametrize("reason", FINAL)
def test_every_reason_has_its_exit_status_and_last_word(daemon, ensure_model, termination_log, reason):
    daemon.on_ensure = refusing(reason)
    status, out, err = ensure_model("org/name")
    request_id = daemon.ensured.get_nowait().request_id
    assert (status, out) == (TABLE[reason].exit_status, "")
    last_word = f"the message of the daemon; {TABLE[reason].mend} (request {request_id})"
    assert err.splitlines()[-1] == f"ensure-model: {last_word}"
    assert termination_log.read_text() == f"{reason}: {last_word}\n"
    assert daemon.ensured.empty()  # final: asked once


def test_a_message_that_has_the_mend_already_is_not_said_twice(daemon, ensure_model):
    mend = TABLE[Reason.OVER_BUDGET].mend
    daemon.on_ensure = refusing(Reason.OVER_BUDGET, message=f"needs 90 GB of 50 GB; {mend}")
    _, _, err = ensure_model("org/name")
    assert err.count(mend) == 1


def test_a_mend_of_the_daemons_own_takes_the_tables_place(daemon, ensure_model):
    daemon.on_ensure = refusing(
        Reason.STORAGE_ERROR, message="hub is a symlink; remove it", metadata={"mend": "remove it"}
    )
    _, _, err = ensure_model("org/name")
    assert err.splitlines()[-1].startswith("ensure-model: hub is a symlink; remove it (request ")


@pytest.mark.parametrize(
    ("code", "exit_status", "words"),
    [
        (grpc.StatusCode.UNIMPLEMENTED, 69, "older than this client"),
        (grpc.StatusCode.INTERNAL, 70, "report it"),
        (grpc.StatusCode.UNKNOWN, 70, "report it"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 75, "come again"),
    ],
)
def test_errors_without_details_go_by_their_code(daemon, ensure_model, code, exit_status, words):
    def on_ensure(_request, context):
        yield progress()
        context.abort(code, "bare")

    daemon.on_ensure = on_ensure
    status, _, err = ensure_model("org/name")
    assert status == exit_status
    assert words in err


def test_a_reason_of_a_newer_daemon_goes_by_its_code(daemon, ensure_model):
    def on_ensure(_request, context):
        yield progress()
        context.set_trailing_metadata(details("MOON_PHASE", "wrong moon"))
        context.abort(grpc.StatusCode.UNAVAILABLE, "wrong moon")

    daemon.on_ensure = on_ensure
    status, _, err = ensure_model("org/name")
    assert status == 69
    assert "wrong moon" in err


def test_a_stream_that_ends_without_an_answer_is_a_fault_of_the_daemon(daemon, ensure_model):
    daemon.on_ensure = lambda _request, _context: iter([progress()])
    status, out, _ = ensure_model("org/name")
    assert (status, out) == (70, "")


def test_timeout_is_75_and_says_what_it_waited_for(daemon, ensure_model, termination_log):
    def on_ensure(_request, context):
        yield progress(done=3_000_000_000, total=15_000_000_000)
        until_over(context)

    daemon.on_ensure = on_ensure
    status, out, err = ensure_model("org/name", "--timeout", "500ms")
    assert (status, out) == (75, "")
    assert "downloading 3.0 GB of 15.0 GB (20 %)" in err.splitlines()[-1]
    assert termination_log.read_text().startswith("TIMEOUT: ")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["@main"],
        ["org/name@"],
        ["org/name", "--bogus"],
        ["org/name", "--time", "5s"],  # no abbreviations: a later flag may begin the same
        ["org/name", "--timeout", "5 parsecs"],
        ["org/name", "--timeout", "0s"],
        ["org/name@v1", "--revision", "v2"],
        ["org/name", "--profile", "full", "--include", "*"],
        ["org/name", "--", "true"],
        ["org/name", "--hold", "--"],
        ["org/name", "--ready-file", "/tmp/x"],
        ["org/name", "--pass-token"],
        ["org/name", "--address", "unix://relative"],
        ["org/name", "--address", "http://host:1"],
        ["org/name", "--address", "host"],
        ["org/name", "--address", "unix:///" + "x" * 120],
    ],
)
def test_usage_errors_are_64_and_reach_the_termination_log(daemon, ensure_model, termination_log, arguments):
    status, out, err = ensure_model(*arguments)
    assert (status, out) == (64, "")
    assert err.count("\n") == 1
    assert termination_log.read_text().startswith("USAGE: ")


def test_an_address_error_names_the_value_and_where_it_came_from(ensure_model):
    _, _, err = ensure_model("org/name", MODELCACHE_ADDRESS="ftp://x")
    assert "MODELCACHE_ADDRESS" in err
    assert "'ftp://x'" in err


def test_a_long_last_word_is_cut_to_what_kubelet_reads(daemon, ensure_model, termination_log):
    daemon.on_ensure = refusing(Reason.IN_USE, message="é" * 3000)
    ensure_model("org/name")
    data = termination_log.read_bytes()
    assert len(data) <= 4096
    assert data.decode().endswith("…")


def test_the_termination_log_flag_goes_before_the_environment(daemon, ensure_model, termination_log, tmp_path):
    daemon.on_ensure = refusing(Reason.POLICY)
    ensure_model("org/name", "--termination-log", str(tmp_path / "other"))
    assert (tmp_path / "other").read_text().startswith("POLICY: ")
    assert not termination_log.exists()


def test_a_termination_log_that_cannot_be_written_is_a_warning(daemon, ensure_model, tmp_path):
    daemon.on_ensure = refusing(Reason.POLICY)
    status, _, err = ensure_model("org/name", "--termination-log", str(tmp_path))
    assert status == 77
    assert "warning: cannot write the termination log" in err


def test_success_leaves_the_termination_log_alone(daemon, ensure_model, termination_log):
    ensure_model("org/name")
    assert not termination_log.exists()


def test_the_token_is_sent_only_when_asked_to(daemon, ensure_model):
    ensure_model("org/name", HF_TOKEN=TOKEN)
    assert daemon.ensured.get_nowait().token == ""
    ensure_model("org/name", "--pass-token", HF_TOKEN=f" {TOKEN}\n")
    assert daemon.ensured.get_nowait().token == TOKEN


def test_the_token_is_in_no_output_even_if_the_daemon_says_it(daemon, ensure_model, termination_log):
    def on_ensure(_request, context):
        yield cache_pb2.EnsureModelResponse(progress=cache_pb2.Progress(phase=2, detail=f"with {TOKEN}"))
        refuse(context, Reason.TOKEN_REJECTED, f"the Hub refused {TOKEN}")

    daemon.on_ensure = on_ensure
    status, out, err = ensure_model("org/name", "--pass-token", HF_TOKEN=TOKEN)
    assert status == 77
    assert "the Hub refused ***" in err
    assert TOKEN not in out + err + termination_log.read_text()


def test_control_characters_of_a_message_reach_no_terminal(daemon, ensure_model):
    daemon.on_ensure = refusing(Reason.INVALID_REPO_ID, message="\x1b[2Jclean\nensure-model: ready")
    _, _, err = ensure_model("org/name")
    assert "\x1b" not in err
    assert "\nensure-model: ready" not in err
