"""What is a credential is not shown, and nothing else is hidden."""

from pipeline.redact import dropping_secrets, without_secrets


def test_only_what_is_a_credential_is_hidden():
    shown = {"text_key": "text", "tokenizer": "bert", "metadata": {"key": "string"}, "max_tokens": 3, "uri": "s3://b/k"}
    hidden = {"token": "x", "secret": "x", "password": "x", "api_key": "x", "storage_options": {"key": "x", "client_kwargs": {"region_name": "x"}}}
    assert without_secrets({**shown, "list": [hidden]}) == {
        **shown,
        "list": [
            {
                "token": "***",
                "secret": "***",
                "password": "***",
                "api_key": "***",
                "storage_options": {"key": "***", "client_kwargs": {"region_name": "***"}},
            }
        ],
    }
    assert dropping_secrets({**shown, "inner": hidden, "token": None}) == {**shown, "inner": {}, "token": None}


def test_credentials_within_a_uri_are_hidden():
    signed = "https://host/a.jpg?X-Amz-Date=1&X-Amz-Signature=SECRET&x=1"
    assert without_secrets(signed) == "https://host/a.jpg?X-Amz-Date=1&X-Amz-Signature=***&x=1"
    assert without_secrets(["ftp://me:SECRET@host/a"]) == ["ftp://***@host/a"]
    plain = "s3://bucket/a:b@c.jpg?sign=1"
    assert without_secrets(plain) == plain
