"""Every setting: where it comes from, what it may be, and how a wrong one is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from modelcached import config as configuration
from modelcached.config import RELOADABLE, Config, ConfigError, changed_keys, load

KEYS: dict[str, set[str]] = {
    "cache": {
        "dir",
        "budget",
        "min_free",
        "high_watermark",
        "low_watermark",
        "evict_rate",
        "min_age",
        "partial_ttl",
        "prewarm",
        "prewarm_rate",
        "rescan_interval",
    },
    "hub": {"endpoints", "token_file", "ca_file", "resolve_ttl", "timeout", "max_files", "offline"},
    "sources": {"directories"},
    "server": {
        "cache_socket",
        "admin_socket",
        "cache_socket_mode",
        "admin_socket_mode",
        "max_streams",
        "drain_timeout",
    },
    "metrics": {"address", "models", "page"},
    "models": {"file"},
    "leases": {"ttl", "kubelet_pods_dir", "max_pod_lease", "reconnect_grace"},
    "transfer": {"connections", "models", "rate_limit", "stall_timeout", "retry_timeout", "xet"},
    "scrub": {"interval", "rate"},
    "policy": {"allow", "deny", "deny_files"},
    "log": {"format", "level"},
}

GOOD: dict[str, tuple[str, Any]] = {
    "cache.dir": ('"/srv/models"', "/srv/models"),
    "cache.budget": ('"500GB"', "500000000000B"),
    "cache.min_free": ('"12.5%"', "12.5%"),
    "cache.high_watermark": ('"99%"', "99%"),
    "cache.low_watermark": ('"10%"', "10%"),
    "cache.evict_rate": ('"4GB"', "4000000000B"),
    "cache.min_age": ('"10m"', "600s"),
    "cache.partial_ttl": ('"90m"', "5400s"),
    "cache.prewarm": ("true", True),
    "cache.prewarm_rate": ('"1GB"', "1000000000B"),
    "cache.rescan_interval": ('"1h"', "3600s"),
    "hub.endpoints": ('["https://mirror.example", "http://hub.example:8080/path"]', None),
    "hub.token_file": ('"/run/secrets/token"', "/run/secrets/token"),
    "hub.ca_file": ('"/etc/ssl/corporate.pem"', "/etc/ssl/corporate.pem"),
    "hub.resolve_ttl": ('"0s"', "0s"),
    "hub.offline": ("true", True),
    "sources.directories": ('["/models", "/mnt/old"]', ["/models", "/mnt/old"]),
    "hub.timeout": ('"1.5s"', "1.5s"),
    "hub.max_files": ("10", 10),
    "server.cache_socket": ('"/tmp/c.sock"', "/tmp/c.sock"),
    "server.admin_socket": ('"/tmp/a.sock"', "/tmp/a.sock"),
    "server.cache_socket_mode": ('"0660"', "0660"),
    "server.admin_socket_mode": ('"640"', "0640"),
    "server.max_streams": ("1", 1),
    "server.drain_timeout": ('"30s"', "30s"),
    "metrics.models": ("50", 50),
    "metrics.page": ("false", False),
    "metrics.address": ('"[::1]:9095"', "[::1]:9095"),
    "leases.ttl": ('"1w"', "604800s"),
    "leases.kubelet_pods_dir": ('""', None),
    "leases.max_pod_lease": ('"1234567890ms"', "1234567.89s"),
    "leases.reconnect_grace": ('"2m"', "120s"),
    "transfer.connections": ("64", 64),
    "transfer.models": ("2", 2),
    "transfer.rate_limit": ('"10MB"', "10000000B"),
    "transfer.stall_timeout": ('"5s"', "5s"),
    "transfer.retry_timeout": ('"1h"', "3600s"),
    "transfer.xet": ("false", False),
    "scrub.interval": ('"30d"', "2592000s"),
    "scrub.rate": ('"0B"', "0B"),
    "models.file": ('"/etc/modelcached/models.yaml"', "/etc/modelcached/models.yaml"),
    "policy.allow": ('["org/*"]', ["org/*"]),
    "policy.deny": ('["*/bad"]', ["*/bad"]),
    "policy.deny_files": ('["*.bin"]', ["*.bin"]),
    "log.format": ('"console"', "console"),
    "log.level": ('"debug"', "debug"),
}

BAD: dict[str, list[str]] = {
    "cache.dir": ['"relative"', "7", '""'],
    "cache.budget": ['"lots"', "500", '"500"', '"101%"', '"-1GB"', '"50 %%"', "true", '"99999999PB"', '"1MB"', '"0B"'],
    "cache.min_free": ['"ten"', "10", '"-5%"'],
    "cache.high_watermark": ['"1GB"', "0.95", '"120%"'],
    "cache.low_watermark": ['"85"', "85"],
    "cache.evict_rate": ["1000", '"fast"'],
    "cache.min_age": ['"-1s"', "60", '"soon"'],
    "cache.partial_ttl": ['"24"', "24", '"one day"', '"999999999999d"'],
    "cache.prewarm": ['"perhaps"', "2"],
    "cache.prewarm_rate": ["1000", '"fast"'],
    "cache.rescan_interval": ['"0s"', "600"],
    "hub.endpoints": ["[]", '["ftp://x"]', '["https://user:password@x"]', '["no-scheme"]', '["https://x?q"]', "7"],
    "hub.token_file": ['"relative/token"', "7"],
    "hub.ca_file": ['"corporate.pem"', "true"],
    "hub.resolve_ttl": ['"5"', "300"],
    "hub.offline": ['"maybe"', "7"],
    "sources.directories": ['["relative"]', '"/models"'],
    "hub.timeout": ['"0s"', "30"],
    "hub.max_files": ["0", '"many"', "-1"],
    "server.cache_socket": ['"c.sock"', '""', f'"/{"c" * 107}"'],
    "server.admin_socket": ['"a.sock"', f'"/{"a" * 107}"'],
    "server.cache_socket_mode": ['"rw-rw-rw-"', "438", '"0888"', '"1777"'],
    "server.admin_socket_mode": ['"6"'],
    "server.max_streams": ["0", '"x"'],
    "server.drain_timeout": ["10"],
    "metrics.page": ['"perhaps"', "2"],
    "metrics.models": ["-1", "1001", '"all"'],
    "metrics.address": ['"9095"', '"host:"', '"host:99999"', '"a b:1"', "9095"],
    "leases.ttl": ['"0s"', "86400"],
    "leases.kubelet_pods_dir": ['"pods"'],
    "leases.max_pod_lease": ["1"],
    "leases.reconnect_grace": ['"60"'],
    "transfer.connections": ["0", "65", '"x"'],
    "transfer.models": ["0", "-1", '"x"'],
    "transfer.rate_limit": ["1000", '"fast"'],
    "transfer.stall_timeout": ['"0s"', "30"],
    "transfer.retry_timeout": ['"0ms"', "600"],
    "transfer.xet": ['"perhaps"', "2"],
    "scrub.interval": ['"0s"', "14"],
    "scrub.rate": ["20", '"slow"'],
    "models.file": ['"models.yaml"', "[]"],
    "policy.allow": ['"org/*"', "[1]"],
    "policy.deny": ["true"],
    "policy.deny_files": ['"*.bin"'],
    "log.format": ['"xml"'],
    "log.level": ['"verbose"', "10"],
}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith("MODELCACHED_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(configuration, "DEFAULT_CONFIG_FILE", tmp_path / "default.toml")


def written(tmp_path: Path, key: str, value: str) -> Path:
    section, _, name = key.partition(".")
    file = tmp_path / "config.toml"
    file.write_text(f"[{section}]\n{name} = {value}\n")
    return file


def effective(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return config.effective()[section][name]


def test_the_keys_are_those_that_others_script_against() -> None:
    found = {name: set(field.annotation.model_fields) for name, field in Config.model_fields.items()}  # type: ignore[union-attr]
    assert found == KEYS
    assert set(GOOD) == set(BAD) == {f"{section}.{key}" for section, keys in KEYS.items() for key in keys}


@pytest.mark.parametrize("key", GOOD)
def test_a_good_value_is_taken_from_the_file(tmp_path: Path, key: str) -> None:
    text, shown = GOOD[key]
    config = load(written(tmp_path, key, text))
    if key == "hub.endpoints":
        shown = ["https://mirror.example", "http://hub.example:8080/path"]
    assert effective(config, key) == shown


@pytest.mark.parametrize("key", GOOD)
def test_the_environment_says_the_same_as_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    text, _ = GOOD[key]
    value = json.loads(text)
    section, _, name = key.partition(".")
    monkeypatch.setenv(
        f"MODELCACHED_{section}__{name}".upper(), ", ".join(value) if isinstance(value, list) else str(value)
    )
    assert effective(load(None), key) == effective(load(written(tmp_path, key, text)), key)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_a_bad_value_is_an_error_that_names_its_key(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, key, value))
    assert str(caught.value).startswith(f"{tmp_path}/config.toml: {key}")
    assert len(str(caught.value).splitlines()) == 1


def test_a_bad_value_in_the_environment_names_its_key_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELCACHED_TRANSFER__CONNECTIONS", "many")
    with pytest.raises(ConfigError, match=r"^the environment: transfer\.connections: "):
        load(None)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[cache]\nbudgets = '1GB'", "cache.budgets: no such setting; did you mean cache.budget?"),
        ("[cachee]\nbudget = '1GB'", "cachee: no such setting; did you mean cache?"),
        ("budget = '1GB'", "budget: no such setting; did you mean cache.budget?"),
        ("[transfer]\nendpoints = []", "transfer.endpoints: no such setting; did you mean hub.endpoints?"),
        ("[cache]\nzeal = 1", "cache.zeal: no such setting"),
        ("[hub]\nendpont = 1", "hub.endpont: no such setting; did you mean hub.endpoints?"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_it(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value) == f"{file}: {named}"


def test_an_unknown_name_in_the_environment_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELCACHED_CACHE__BUDGETS", "1GB")
    with pytest.raises(ConfigError, match=r"^MODELCACHED_CACHE__BUDGETS: no such setting; did you mean .*_BUDGET\?$"):
        load(None)


@pytest.mark.parametrize(
    ("text", "line"),
    [("[cache]\nbudget = 500GB\n", "budget = 500GB"), ("[cache\n", "[cache"), ("[cache]\ndir = 'x", "dir = 'x")],
)
def test_what_is_no_toml_is_told_with_its_line(tmp_path: Path, text: str, line: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert f": {line}; text needs quotes" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_mistake_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELCACHED_NONSENSE", "1")
    file = tmp_path / "config.toml"
    file.write_text("[cache]\nbudget = 'x'\nmin_free = 'y'\n[log]\nlevel = 'z'\n")
    with pytest.raises(ConfigError) as caught:
        load(file)
    starts = [line.removeprefix(f"{file}: ").partition(":")[0] for line in str(caught.value).splitlines()]
    assert sorted(starts) == ["MODELCACHED_NONSENSE", "cache.budget", "cache.min_free", "log.level"]


def test_watermarks_stand_in_their_order(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="low_watermark is above high_watermark"):
        load(written(tmp_path, "cache.high_watermark", '"50%"'))


def test_the_two_sockets_are_two(tmp_path: Path) -> None:
    file = written(tmp_path, "server.cache_socket", '"/run/modelcached/admin/admin.sock"')
    with pytest.raises(ConfigError, match=r": server: cache_socket and admin_socket are both /run"):
        load(file)


def test_flags_come_before_the_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[cache]\nbudget = '1GB'\nmin_free = '1GB'\npartial_ttl = '1h'\n")
    monkeypatch.setenv("MODELCACHED_CACHE__BUDGET", "2GB")
    monkeypatch.setenv("MODELCACHED_CACHE__MIN_FREE", "2GB")
    cache = load(file, {"cache": {"budget": "3GB"}}).cache
    assert (str(cache.budget), str(cache.min_free)) == ("3000000000B", "2000000000B")
    assert cache.partial_ttl == timedelta(hours=1)


@pytest.mark.parametrize("content", [b"[cache", b"\xff\xfe", b"[cache]\nbudget = '1GB'\nbudget = '2GB'"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=str(file)):
        load(file)


def test_a_file_that_was_named_must_be_there_the_default_need_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "none.toml")
    assert load(None) == Config()


def test_a_share_is_of_the_filesystem(tmp_path: Path) -> None:
    budget = load(written(tmp_path, "cache.budget", '"80%"')).cache.budget
    assert budget.of(1_000_000) == 800_000
    assert load(written(tmp_path, "cache.budget", '"5GB"')).cache.budget.of(1_000_000) == 5_000_000_000


def test_defaults_are_what_the_design_says() -> None:
    config = Config()
    assert str(config.cache.dir) == "/var/lib/llm-models"
    assert config.cache.partial_ttl == timedelta(hours=24)
    assert config.leases.reconnect_grace == timedelta(seconds=60)
    assert str(config.server.cache_socket) == "/run/modelcached/cache/cache.sock"
    assert str(config.server.admin_socket) == "/run/modelcached/admin/admin.sock"
    assert (config.server.cache_socket_mode, config.server.admin_socket_mode) == (0o666, 0o600)


# Reload


@pytest.mark.parametrize("key", GOOD)
def test_a_change_is_known_as_one_that_can_be_reloaded_or_not(tmp_path: Path, key: str) -> None:
    new = load(written(tmp_path, key, GOOD[key][0]))
    now, later = changed_keys(Config(), new)
    section, _, name = key.partition(".")
    assert (now, later) == (({key}, set()) if name in RELOADABLE.get(section, ()) else (set(), {key}))


def test_what_the_design_reloads_is_reloadable() -> None:
    for key in ("cache.budget", "cache.high_watermark", "policy.allow", "policy.deny", "hub.token_file", "models.file"):
        section, _, name = key.partition(".")
        assert name in RELOADABLE[section]


def test_no_difference_is_too_small_to_be_noticed(tmp_path: Path) -> None:
    old = load(written(tmp_path, "leases.max_pod_lease", '"12345678s"'))
    new = load(written(tmp_path, "leases.max_pod_lease", '"12345679s"'))
    assert changed_keys(old, new)[0] == {"leases.max_pod_lease"}


# --check


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "modelcached.main", *arguments, "--check"], capture_output=True, text=True, check=False
    )


def test_check_prints_the_effective_settings_which_are_a_configuration_again(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[cache]\nbudget = '500GB'\n[leases]\nttl = '36h'\n[policy]\nallow = ['org/*']\n")
    done = check("--config", str(file), "--cache-dir", str(tmp_path), "--hub-endpoint", "https://hub.example")
    assert (done.returncode, done.stderr) == (0, "")
    printed = json.loads(done.stdout)
    assert {section: set(values) for section, values in printed.items()} == KEYS
    assert printed["cache"]["budget"] == "500000000000B"
    assert printed["cache"]["dir"] == str(tmp_path)
    assert printed["hub"]["endpoints"] == ["https://hub.example"]
    assert printed["server"]["cache_socket_mode"] == "0666"
    assert Config(**printed).effective() == printed


def test_check_shows_no_secret(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("hf_secret")
    done = check("--config", str(written(tmp_path, "hub.token_file", json.dumps(str(token)))))
    assert done.returncode == 0
    assert str(token) in done.stdout
    assert "hf_secret" not in done.stdout


def test_check_tells_each_mistake_and_exits_78(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[cache]\nbudget = 'x'\nsize = 1\n")
    done = check("--config", str(file))
    assert (done.returncode, done.stdout) == (78, "")
    assert [line.split(": ")[2] for line in done.stderr.splitlines()] == [
        "cache.budget",
        "cache.size",
    ]


def test_check_tells_each_mistake_of_the_model_list(tmp_path: Path) -> None:
    listed = tmp_path / "models.yaml"
    file = written(tmp_path, "models.file", json.dumps(str(listed)))
    listed.write_text("models: [{repo: org/name}]")
    assert check("--config", str(file)).returncode == 0
    listed.write_text("models: [{repo: a b}, {repo: org/name, profil: x}]")
    done = check("--config", str(file))
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.splitlines() == [
        f"modelcached: {listed}: model 1 (a b).repo: 'a b' is not a repository id",
        f"modelcached: {listed}: model 2 (org/name).profil: no such key",
    ]


def test_check_refuses_a_budget_that_the_start_would_refuse() -> None:
    done = check("--budget", "5MB")
    assert (done.returncode, done.stdout) == (78, "")
    assert (
        done.stderr
        == "modelcached: the command line: cache.budget: 5.0 MB is less than the 8.4 MB that the daemon itself needs\n"
    )
    assert check("--budget", "8MiB").returncode == 0


@pytest.mark.parametrize("arguments", [["--nope"], ["surplus"], ["--budget"]])
def test_a_command_line_that_cannot_be_obeyed_exits_64(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "modelcached.main", *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.startswith("modelcached: ")
    assert done.stderr.endswith("; see modelcached --help\n")
    assert done.stderr.count("\n") == 1


def test_an_empty_directory_is_refused_and_is_not_the_one_we_stand_in() -> None:
    """`--cache-dir "$UNSET"` in a script."""
    done = check("--cache-dir", "")
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith("modelcached: the command line: cache.dir: ")
