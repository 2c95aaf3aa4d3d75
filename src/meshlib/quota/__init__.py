"""Who counts for all processes, and how is he asked? The edge of policy/quota: Redis, Envoy's rate limit service."""
