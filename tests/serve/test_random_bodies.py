"""A thousand bodies made from /openapi.json: none makes the server fail."""

from pathlib import Path

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error

from icecache.integrations.embedded import load
from tests.serve.running import running
from tests.serve.test_faults import assert_alive

BODIES = 1000


def test_a_thousand_random_bodies(tiny_model: Path) -> None:
    model, tokenizer = load(tiny_model, "float32")
    with running(model, tokenizer, most_tokens=2) as server:
        schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
        operations = [x.ok() for x in schema.get_all_operations() if x.ok().method == "post"]
        assert {each.path for each in operations} == {"/v1/chat/completions", "/v1/completions"}
        statuses: list[int] = []
        for operation in operations:
            modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
            for mode in modes:

                @given(case=operation.as_strategy(generation_mode=mode))
                @settings(
                    max_examples=BODIES // 4,
                    deadline=None,
                    derandomize=True,
                    database=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                def send(case: schemathesis.Case) -> None:
                    if isinstance(case.body, dict) and "model" in case.body and len(statuses) % 2:
                        case.body["model"] = "tiny"
                    answer = case.call(timeout=60)
                    statuses.append(answer.status_code)
                    case.validate_response(answer, checks=[not_a_server_error])
                    assert "Traceback" not in answer.text

                send()
        assert len(statuses) >= BODIES
        assert max(statuses) < 500
        # some of them were served
        assert statuses.count(200) > 20
        assert_alive(server)
