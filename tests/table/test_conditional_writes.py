"""A store that ignores `If-None-Match` lets two writers make the same version of a table; one of them loses its rows."""

import threading

import boto3
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from pipeline.table.at import TableAt
from pipeline.table.swap import EngineRefused, self_test


@pytest.fixture
def store_that_ignores_conditions():
    """A table in a real S3 server that never sees the condition."""
    inner = DomainDispatcherApplication(create_backend_app)

    def application(environ, start_response):
        environ.pop("HTTP_IF_NONE_MATCH", None)
        return inner(environ, start_response)

    server = make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    boto3.client("s3", endpoint_url=endpoint, aws_access_key_id="k", aws_secret_access_key="s", region_name="us-east-1").create_bucket(
        Bucket="careless"
    )
    options = {"endpoint": endpoint, "allow_http": "true", "aws_access_key_id": "k", "aws_secret_access_key": "s", "region": "us-east-1"}
    yield TableAt(uri="s3://careless/db", name="t", storage_options=options)
    server.shutdown()


def test_a_store_without_conditional_writes_is_refused(store_that_ignores_conditions):
    with pytest.raises(EngineRefused, match="does not honour conditional writes"):
        for _ in range(5):  # a race: the server runs in this process, and on a busy machine one writer may be through before the next begins
            self_test(store_that_ignores_conditions)
