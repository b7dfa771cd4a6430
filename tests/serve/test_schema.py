"""schemathesis against our own OpenAPI schema: whatever it makes up, no 5xx. `make schema` tries more."""

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

EXAMPLES = int(os.environ.get("RORQUAL_SCHEMA_EXAMPLES", "4"))
"""For each operation."""


def operations(server):
    api = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    return [result.ok() for result in api.get_all_operations()]


def shortened(body):
    """Answers of a few tokens: what is tried is the requests."""
    if isinstance(body, dict):
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if isinstance(body.get(name), int) and body[name] > 2:
                body[name] = 2
        if "model" in body:
            body["model"] = "tiny"
    return body


@pytest.mark.timeout(0 if EXAMPLES > 100 else 300)
def test_no_made_up_request_is_an_internal_error(server):
    tried = 0
    for operation in operations(server):

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=EXAMPLES <= 100,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case):
            nonlocal tried
            tried += 1
            case.body = shortened(case.body)
            response = case.call(timeout=60)
            assert response.status_code < 500, f"{case.method} {case.path}: {response.text}"
            if response.status_code >= 400:
                assert "error" in response.json()

        check()
    assert tried >= len(operations(server))
