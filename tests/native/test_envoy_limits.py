"""Does an Envoy turn away as many as our library would? Real ones, beside a service, on our control plane."""

from __future__ import annotations

import httpx
from test_envoy_sidecar import Hamlet, Service, eventually, hamlet, pytestmark

from quota.quota_servers import rate_limit_server

__all__ = ["hamlet", "pytestmark"]

LIMITS = """
apiVersion: meshlib.io/v1alpha1
kind: RateLimit
metadata: {name: reviews, namespace: default}
spec:
  selector: {matchLabels: {app: reviews}}
  limits:
  - {name: all, requests: 9, per: 3600s, pathPrefix: /limited}
  - {name: each-user, requests: 2, per: 3600s, keys: ["header:end-user"], pathPrefix: /limited, answers: true}
  - {name: posts, requests: 1, per: 3600s, methods: [post, put], pathPrefix: /limited}
  - {name: quick, requests: 1, per: 1ms, burst: 100, keys: [address]}
  - {name: asleep, requests: 1, per: 3600s, shadow: true}
"""


def quota(address: str) -> str:
    return f"""
apiVersion: meshlib.io/v1alpha1
kind: RateLimit
metadata: {{name: shared, namespace: default}}
spec:
  selector: {{matchLabels: {{app: reviews}}}}
  quotas:
  - service: {address}
    domain: shop
    descriptors: [[{{key: tier, from: "header:tier"}}]]
    timeout: 10s
    failureModeDeny: true
    answers: true
"""


def test_an_envoy_counts_what_a_ratelimit_says(hamlet: Hamlet) -> None:
    """A bucket for each user, for methods and for a path; one in shadow lets pass; what is told is Envoy's."""
    service = hamlet.stack.enter_context(Service().serving())
    beside = hamlet.envoy("reviews", service)
    url = f"http://127.0.0.1:{beside.port}"
    with httpx.Client(trust_env=False, timeout=30) as client:
        eventually(lambda: client.get(f"{url}/").status_code == 200, "the service is served")
        hamlet.apply(LIMITS)
        probe = {"end-user": "probe"}
        eventually(
            lambda: "x-ratelimit-limit" in client.get(f"{url}/limited", headers=probe).headers, "the limits arrive"
        )

        def asked(method: str, user: str = "") -> int:
            return client.request(method, f"{url}/limited", headers={"end-user": user} if user else {}).status_code

        assert [asked("GET", "jason") for _ in range(3)] == [200, 200, 429]
        assert asked("GET", "anna") == 200
        assert client.get(f"{url}/free", headers={"end-user": "jason"}).status_code == 200
        refused = client.get(f"{url}/limited", headers={"end-user": "jason"})
        assert (refused.status_code, refused.text) == (429, "local_rate_limited")
        assert refused.headers["x-envoy-ratelimited"] == "true"
        assert refused.headers["x-ratelimit-remaining"] == "0"
        assert asked("POST") != 429  # whatever the service says to it
        assert asked("PUT") == 429
        assert 429 in [asked("GET") for _ in range(9)]
    hamlet.assert_accepted()


def test_an_envoy_asks_the_service_that_a_quota_names(hamlet: Hamlet) -> None:
    """The very service that our processes ask."""
    service = hamlet.stack.enter_context(Service().serving())
    counting = hamlet.stack.enter_context(rate_limit_server({"shop": {"tier_gold": 2}}))
    beside = hamlet.envoy("reviews", service)
    url = f"http://127.0.0.1:{beside.port}/"
    with httpx.Client(trust_env=False, timeout=30) as client:
        eventually(lambda: client.get(url).status_code == 200, "the service is served")
        hamlet.apply(quota(counting))
        gold = {"tier": "gold"}
        eventually(lambda: "x-ratelimit-limit" in client.get(url, headers=gold).headers, "the quota arrives")
        answers = [client.get(url, headers=gold) for _ in range(2)]
        assert [each.status_code for each in answers] == [200, 429]
        assert answers[1].headers["x-envoy-ratelimited"] == "true"
        assert client.get(url, headers={"tier": "silver"}).status_code == 200
    hamlet.assert_accepted()
