from __future__ import annotations

from pathlib import Path

import pytest

from gcref.errors import ConfigError
from gcref.hub import config
from gcref.hub.config import BrokerConfig

BROKER = """
[broker]
url = "amqps://rabbit.example.org:5672/site"
management_url = "http://127.0.0.1:15672"
user = "hub"
password = "geheim"
"""


def load(tmp_path: Path, text: str) -> config.HubConfig:
    path = tmp_path / "hub.toml"
    path.write_text(text)
    return config.load(path)


def test_without_a_file_there_are_defaults(home: Path) -> None:
    found = config.load()
    assert (found.host, found.port, found.broker) == ("127.0.0.1", config.DEFAULT_PORT, None)
    assert found.database == f"sqlite:///{home / 'hub.db'}"


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not there"):
        config.load(tmp_path / "hub.toml")


def test_paths_are_those_beside_the_file(tmp_path: Path) -> None:
    for name in ("hub.crt", "hub.key"):
        (tmp_path / name).touch()
    found = load(tmp_path, 'database = "x.db"\ncert = "hub.crt"\nkey = "hub.key"')
    assert found.database == f"sqlite:///{tmp_path / 'x.db'}"
    assert found.cert == str(tmp_path / "hub.crt")


def test_the_environment_comes_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCREF_HUB_BROKER_PASSWORD", "from the environment")
    monkeypatch.setenv("GCREF_HUB_DATABASE", "postgresql://me:pw@db/hub")
    found = load(tmp_path, BROKER.replace('password = "geheim"', ""))
    assert found.broker is not None
    assert found.broker.password == "from the environment"
    assert found.database == "postgresql+psycopg://me:pw@db/hub"


def test_secrets_are_in_no_representation(tmp_path: Path) -> None:
    found = load(tmp_path, 'database = "postgresql://me:kennwort@db/hub"' + BROKER)
    assert "geheim" not in repr(found)
    assert "kennwort" not in repr(found)


@pytest.mark.parametrize(
    ("vhost", "url"),
    [
        ("", "amqps://party.x:a%2Fb@rabbit.example.org:5672/%2F"),
        ("/", "amqps://party.x:a%2Fb@rabbit.example.org:5672/%2F"),
        ("/site", "amqps://party.x:a%2Fb@rabbit.example.org:5672/site"),
        ("/%2Fsite", "amqps://party.x:a%2Fb@rabbit.example.org:5672/%2Fsite"),
    ],
)
def test_parties_are_given_the_virtual_host_of_the_url(tmp_path: Path, vhost: str, url: str) -> None:
    broker = load(tmp_path, BROKER.replace("/site", vhost)).broker
    assert isinstance(broker, BrokerConfig)
    assert broker.url_for("party.x", "a/b") == url


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        ("port = 70000", "port", "port's number"),
        ('port = "80"', "port", "port's number"),
        ("prot = 80", "prot", "did you mean port"),
        ("anything_else = 80", "anything_else", "known are"),
        ("lease_s = 0", "lease_s", "at least"),
        ("lease_s = true", "lease_s", "seconds"),
        ('cert = "x"', "cert", "belong together"),
        ('cert = "x"\nkey = "y"', "cert", "cannot be read"),
        ('database = "mysql://x"', "database", "unknown kind"),
        ("broker = 3", "broker", "no table"),
        ('host = "0.0.0.0"', "host", "insecure"),
        (BROKER.replace("amqps://", "amqp://"), "broker.url", "in clear"),
        ('insecure = "yes"', "insecure", "true or false"),
        ('[broker]\nurl = "amqp://x"', "broker.management_url", "missing"),
        (BROKER.replace("amqps://", "http://"), "broker.url", "amqp://host:port"),
        (BROKER.replace("amqps://", "amqps://me:pw@"), "broker.url", "without a user"),
        (BROKER.replace("http://", "http://me:pw@"), "broker.management_url", "without a user"),
        (BROKER + "mailbox_bytes = 10", "broker.mailbox_bytes", "2097152"),
        (BROKER + "prefetch = 10", "broker.prefetch", "known"),
        ("port", None, "no TOML"),
    ],
)
def test_what_is_wrong_is_named_with_a_remedy(tmp_path: Path, text: str, key: str | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        load(tmp_path, text)
    assert (caught.value.key, caught.value.file) == (key, str(tmp_path / "hub.toml"))
    assert caught.value.remedy
    assert "pw@" not in str(caught.value)


def test_a_broker_of_the_hubs_own_is_at_the_hubs_name_and_beside_its_file(tmp_path: Path) -> None:
    found = load(tmp_path, 'host = "hub.example.org"\ninsecure = true\n[broker]\nstart = true')
    own = config.OwnBrokerConfig(tmp_path / "broker", "hub.example.org", config.DEFAULT_BROKER_PORT)
    assert (found.broker, found.own_broker) == (None, own)
    table = '[broker]\nstart = true\nhost = "hub.example.org"\nport = 1\nmailbox_bytes = 4000000'
    text = f'host = "0.0.0.0"\ninsecure = true\n{table}'
    assert load(tmp_path, text).own_broker == own._replace(port=1, mailbox_bytes=4_000_000)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('host = "0.0.0.0"\ninsecure = true\n[broker]\nstart = true', "broker.host"),
        ("[broker]\nstart = false", "broker.start"),
        ('[broker]\nstart = true\nurl = "amqp://here"', "broker.url"),
    ],
)
def test_what_contradicts_a_broker_of_its_own_is_named(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert caught.value.key == key
