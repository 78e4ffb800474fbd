"""Everything `almanac serve` may be told: files, variables, options, defaults, reloads."""

from __future__ import annotations

import argparse
import logging
from dataclasses import fields

import httpx
import pytest
import yaml

from planner.cli import check_config, serve
from planner.cli.gateway_options import config_of
from planner.domain.errors import InvalidInput
from planner.domain.files import data_dir
from runtime.config import GatewayConfig, LaunchConfig, all_settings, load_config
from runtime.diagnostics import diagnostics
from runtime.settings import resolve, settings_of, unknown_variables

FLEET = """
schema: almanac.fleet/1
workers:
  - {{id: e0, url: "{url}", model: m, gpu: H100, latency: 8b-h100-1-bf16, kv_blocks: 500, slots: 4}}
"""


@pytest.fixture
def write(tmp_path):
    def written(extra="", url="http://127.0.0.1:9", name="fleet.yaml"):
        path = tmp_path / name
        path.write_text(FLEET.format(url=url) + extra)
        return path

    return written


def parse(module, *words):
    parser = argparse.ArgumentParser()
    module.register(parser.add_subparsers())
    name = module.__name__.rsplit(".", 1)[1].replace("_", "-")
    return parser.parse_args([name, *map(str, words)])


def load(path, environment=None, **flags):
    return load_config(path, environment=environment or {}, flags=flags)


def test_every_field_is_a_setting_with_one_name_everywhere():
    """Each field has a key, an option, a variable and a line of help; none is used twice."""
    for record in (GatewayConfig, LaunchConfig):
        assert [one.name for one in settings_of(record)] == [one.name for one in fields(record)]
    settings = all_settings()
    for names in (
        [one.path for one in settings],
        [one.variable for one in settings],
        [flag for one in settings for flag in one.flags],
    ):
        assert len(set(names)) == len(names)
    assert all(len(one.help) > 5 for one in settings)
    assert all(one.check(one.default, one.path) == one.default for one in settings)


def test_option_wins_over_variable_over_file_over_default(write):
    """Each source wins over the next, and each value says where it came from."""
    path = write("server: {port: 1, seed: 1, drain_s: 1}\n")
    environment = {"ALMANAC_SERVER_PORT": "2", "ALMANAC_SERVER_SEED": "2"}
    config = load(path, environment, **{"server.port": "3"})
    assert (config.launch.port, config.gateway.seed, config.gateway.drain_s) == (3, 2, 1.0)
    origins = {one: config.sources[f"server.{one}"].origin for one in ("port", "seed", "drain_s")}
    assert origins == {"port": "flag", "seed": "env", "drain_s": "file"}
    assert config.sources["server.host"].origin == "default"


def test_every_setting_can_be_given_by_variable_and_by_option(write):
    """The text of each default, given as a variable or an option, is read back as the default."""

    def text(one):
        value = one.default
        return ",".join(value) if one.kind is tuple else str(value).lower()

    plain = [one for one in all_settings() if one.default not in (None, ())]
    assert len(plain) > 30
    texts = {one: text(one) for one in plain}
    environment = {one.variable: given for one, given in texts.items()}
    by_variable = resolve(plain, file={}, file_name="f", environment=environment, flags={})
    assert {one.path: one.default for one in plain} == {
        path: source.value for path, source in by_variable.items()
    }
    words = []
    for one in plain:
        if one.kind is bool:
            words.append(one.flags[0] if one.default else one.flags[0].replace("--", "--no-", 1))
        else:
            words += [one.flags[-1], texts[one]]
    config = config_of(parse(serve, write(), *words))
    assert all(config.sources[one.path].origin == "flag" for one in plain)
    assert all(config.sources[one.path].value == one.default for one in plain)


@pytest.mark.parametrize(
    ("extra", "where"),
    [
        ("server: {port: 70000}", r"server\.port: 70000.*use a number from 0 to 65535"),
        ("server: {port: eighty}", r"fleet\.yaml: server\.port: 'eighty' is not an integer"),
        ("server: {prot: 1}", r"fleet\.yaml: server: unknown field 'prot'.*known fields: .*port"),
        ("sever: {port: 1}", r"fleet\.yaml: unknown field 'sever'"),
        ("faults: {retries: -1}", r"faults\.retries: -1 is out of range; use a number >= 0"),
        ("faults: {connect_timeout_s: .nan}", r"faults\.connect_timeout_s: nan is out of range"),
        ("policy: {online: 3}", r"policy\.online: 3 is neither true nor false"),
        ("policy: {workflows: [1]}", r"policy\.workflows\[0\]: 1 is no text"),
        ("hints: {sources: [elsewhere]}", r"hints\.sources\[0\]: 'elsewhere' is unknown"),
        ("limits: [1]", r"fleet\.yaml: limits: expected a mapping"),
        ("tls: {cert: a.pem}", r"fleet\.yaml: tls: certificate and key belong together"),
        ("tenants: [{name: a}]", r"tenants\[0\]: a tenant needs one key; give either key_env"),
        ("tenants: [{name: a, key_env: GONE}]", r"tenants\[0\]\.key_env: .*'GONE' is not set"),
        ("tenants: [{name: a, key_env: K, weight: 0}]", r"tenants\[0\]\.weight: 0 is not a number"),
        (
            "tenants: [{name: a, key_env: K}, {name: a, key_env: L}]",
            r"tenants\[1\]\.name: name 'a' is used twice",
        ),
        (
            "tenants: [{name: a, key_env: K}, {name: b, key_env: K}]",
            r"tenants\[1\]: 'b' has the key of 'a'",
        ),
        ("server: {admin_key_env: GONE}", r"'GONE' is not set or empty.*export GONE="),
    ],
)  # fmt: skip
def test_errors_name_file_field_value_and_remedy(write, extra, where):
    """Whatever is wrong in the file is one error that says where, what and what to do."""
    with pytest.raises(InvalidInput, match=where):
        load(write(extra), {"K": "k", "L": "l"})


@pytest.mark.parametrize(
    ("environment", "flags", "where"),
    [
        ({"ALMANAC_SERVER_PORT": "x"}, {}, r"ALMANAC_SERVER_PORT: 'x' is not an integer"),
        ({"ALMANAC_POLICY_ONLINE": "maybe"}, {}, "ALMANAC_POLICY_ONLINE: 'maybe' is neither"),
        ({}, {"server.port": "70000"}, r"--port: 70000 is out of range"),
        ({}, {"faults.retries": "two"}, r"--retries: 'two' is not an integer"),
    ],
)
def test_errors_name_the_variable_or_option(write, environment, flags, where):
    """A wrong variable or option is told by its own name, not by that of the file."""
    with pytest.raises(InvalidInput, match=where):
        load(write(), environment, **flags)


def test_the_policy_may_be_written_as_one_word(write):
    """`policy: name` is short for `policy: {name: name}`."""
    assert load(write("policy: least_load\n")).launch.policy == "least_load"
    assert load(write("policy: {name: least_load}\n")).launch.policy == "least_load"


def test_keys_come_from_files_and_variables(write, tmp_path):
    """A key file is read without its line end; an empty one is refused."""
    key = tmp_path / "key"
    key.write_text("secret\n")
    assert load(write(f"server: {{admin_key_file: {key}}}\n")).gateway.admin_key == "secret"
    config = load(write(f"tenants: [{{name: a, key_file: {key}, weight: 2}}]\n"))
    assert [(one.tenant.name, one.tenant.weight) for one in config.tenants] == [("a", 2.0)]
    key.write_text("\n")
    with pytest.raises(InvalidInput, match="is empty"):
        load(write(f"server: {{admin_key_file: {key}}}\n"))


def test_check_config_shows_everything_but_keys(write, monkeypatch, capsys):
    """`--effective` prints a YAML file that says the same again, with origins, without secrets."""
    monkeypatch.setenv("ALMANAC_SERVER_ADMIN_KEY", "hush")
    monkeypatch.setenv("TEAM", "hush-hush")
    monkeypatch.setenv("ALMANAC_SERVER_PROT", "1")
    path = write("server: {port: 81}\ntenants: [{name: team, key_env: TEAM}]\n")
    assert check_config.run(parse(check_config, path, "--effective", "--drain-s", "3")) == 0
    shown = capsys.readouterr()
    assert "hush" not in shown.out + shown.err
    document = yaml.safe_load(shown.out)
    assert document["server"]["port"] == 81
    assert document["server"]["drain_s"] == 3.0
    assert document["server"]["admin_key"] == "***"
    assert document["tenants"] == ["team"]
    assert "port: 81  # file" in shown.out
    assert "drain_s: 3.0  # flag" in shown.out
    assert "ALMANAC_SERVER_PROT is no setting, ALMANAC_SERVER_PORT is" in shown.err


def test_check_config_looks_into_files(write, capsys):
    """What the settings refer to is checked, too; all well is one word."""
    assert check_config.run(parse(check_config, write())) == 0
    assert capsys.readouterr().out == "ok\n"
    for words, match in (
        (["--table", "no.json"], "no such dispatch table"),
        (["--policy", "nope"], "'nope' is unknown"),
        (["--estimates", "no.json"], "no such estimate table"),
    ):
        with pytest.raises(InvalidInput, match=match):
            check_config.run(parse(check_config, write(), *words))
    with pytest.raises(InvalidInput, match="no endpoints"):
        check_config.run(parse(check_config))


def test_endpoints_come_from_the_file_or_from_addresses(write, tmp_path):
    """Addresses replace workers, with or without a file of settings; both at once are refused."""
    only = tmp_path / "settings.yaml"
    only.write_text("server: {port: 81}\n")
    urls = ["--worker-urls", "http://127.0.0.1:1", "http://127.0.0.1:2"]
    assert config_of(parse(serve, *urls)).fleet is None
    config = config_of(parse(serve, "--config", only, *urls))
    assert (config.fleet, config.launch.port) == (None, 81)
    with pytest.raises(InvalidInput, match=r"--worker-urls: .*fleet\.yaml has workers already"):
        config_of(parse(serve, write(), *urls))
    with pytest.raises(InvalidInput, match="name one file"):
        config_of(parse(serve, only, "--config", only))
    with pytest.raises(InvalidInput, match="no endpoints"):
        config_of(parse(serve, only))


def test_the_example_is_a_good_one(capsys):
    """The configuration in the data folder is accepted as it is."""
    path = data_dir() / "fleets" / "gateway.yaml"
    assert check_config.run(parse(check_config, path)) == 0
    assert capsys.readouterr().out == "ok\n"


def test_foreign_variables_are_no_mistakes():
    """Variables of container platforms and of other sections are left alone."""
    names = ("ALMANAC_SERVER_SERVICE_HOST", "ALMANAC_DATA", "ALMANAC_PUBLIC_DATA", "SERVER_PORT")
    assert unknown_variables(all_settings(), dict.fromkeys(names, "x")) == []


def test_settings_of_a_fleet_file_do_not_change_its_plans(write):
    """A fleet is the same fleet with and without settings beside it."""
    with_settings = load(write("server: {port: 1}\n")).fleet
    assert with_settings.content_hash() == load(write()).fleet.content_hash()


async def test_a_reload_changes_endpoints_policy_and_settings(stack, write, until, caplog):
    """A good file is taken up while serving: new endpoints serve, old ones are let go."""
    async with stack(3, policy="round_robin") as s:
        first, second, third = s.mock.addresses
        row = (
            '  - {{id: {}, url: "{}", model: m, gpu: H100, latency: 8b-h100-1-bf16,'
            " kv_blocks: 500, slots: 4}}\n"
        )

        def rewrite(*workers, extra=""):
            text = "schema: almanac.fleet/1\nworkers:\n"
            path.write_text(text + "".join(row.format(*one) for one in workers) + extra)

        path = write()
        rewrite(("e0", first), ("e1", second), ("e2", third))
        args = parse(serve, path, "--policy", "round_robin")
        reload = serve.Reload(args, s.gateway, config_of(args))

        async def ask(count):
            async with httpx.AsyncClient(base_url=s.base_url) as http:
                answers = [
                    await http.post(
                        "/completions", json={"model": "m", "prompt": "a", "max_tokens": 2}
                    )
                    for _ in range(count)
                ]
            assert {answer.status_code for answer in answers} == {200}
            return {answer.headers["x-almanac-endpoint"] for answer in answers}

        assert await ask(6) == {"e0", "e1", "e2"}
        # e1 leaves, e2 stays, "new" comes under the address that is free now.
        rewrite(("e0", first), ("e2", third), ("new", second), extra="faults: {retries: 0}\n")
        assert reload()
        await until(lambda: "new" in up(s), 0.005)
        assert await ask(6) == {"e0", "e2", "new"}
        assert s.control.config.retries == 0
        rewrite(("e1", first), ("e2", third))
        assert reload()
        await until(lambda: "e1" in up(s), 0.005)
        assert await ask(4) == {"e1", "e2"}
        assert [one["id"] for one in diagnostics(s.control)["endpoints"]] == ["e1", "e2"]
        # A bad file changes nothing and is told in one line.
        caplog.clear()
        for wrong in ("faults: {retries: -1}\n", "policy: nope\n"):
            rewrite(("e0", first), extra=wrong)
            with caplog.at_level(logging.ERROR):
                args.__dict__["policy.name"] = None
                assert not reload()
        assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
        assert "retries: -1 is out of range" in caplog.records[0].getMessage()
        assert await ask(4) == {"e1", "e2"}


def up(s):
    return {str(state.endpoint.id) for state in s.control.router.view.states if state.healthy}
