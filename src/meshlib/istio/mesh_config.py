"""What does the config map `istio` say, and can it be used?"""

from __future__ import annotations

import msgspec
import yaml

from meshlib.istio import resources as r
from meshlib.istio.checks.destinations import check_locality, check_outlier, check_pool, check_zone_aware
from meshlib.istio.checks.parts import at_least, check_export, msgspec_name
from meshlib.istio.checks.routes import check_retries
from meshlib.istio.decoding import converted, explained, with_key, without_nulls
from meshlib.istio.problems import Refused


def mesh_config(spec: r.MeshConfigMap) -> r.MeshConfig:
    """What the ConfigMap `istio` says. Raises an error that parse_text makes a problem of."""
    text = spec.data.get("mesh", "")
    try:
        content = yaml.safe_load(text) or {}
        config: r.MeshConfig = converted(without_nulls(content), r.MeshConfig)
    except yaml.YAMLError as error:
        raise Refused("data.mesh", f"is no YAML: {' '.join(str(error).split())}") from None
    except msgspec.ValidationError as error:
        field, reason = explained(with_key(str(error), content, r.MeshConfig), "data.mesh")
        raise Refused(field, reason) from None
    at = "data.mesh"
    check_locality(config.locality_lb_setting, f"{at}.localityLbSetting")
    check_zone_aware(config.zone_aware_lb_setting, f"{at}.zoneAwareLbSetting")
    at_least(config.connect_timeout, 0.001, f"{at}.connectTimeout")
    if config.default_http_retry_policy is not None:
        check_retries(config.default_http_retry_policy, f"{at}.defaultHttpRetryPolicy")
    policy = config.default_traffic_policy
    if policy is not None and policy.outlier_detection is not None:
        check_outlier(policy.outlier_detection, f"{at}.defaultTrafficPolicy.outlierDetection")
    if policy is not None and policy.connection_pool is not None:
        check_pool(policy.connection_pool, f"{at}.defaultTrafficPolicy.connectionPool")
    for name in (
        "default_service_export_to",
        "default_virtual_service_export_to",
        "default_destination_rule_export_to",
    ):
        check_export(getattr(config, name), f"{at}.{msgspec_name(name)}", nobody=True)
    return config
