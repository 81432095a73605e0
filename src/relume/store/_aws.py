"""The profile files of AWS's tools (~/.aws/credentials, ~/.aws/config), which obstore does not read.

obstore itself knows the environment variables, web identity, container and instance roles. Here are only
static keys, region and endpoint of a profile; a profile that needs more (SSO, assumed roles) is refused by
name, because guessing at credentials ends in someone else's account.
Source: "Configuration and credential file settings in the AWS CLI" (AWS's documentation).
"""

from __future__ import annotations

import configparser
import os
from pathlib import Path
from typing import Any

from relume.errors import ConfigError

_UNSUPPORTED = ("role_arn", "sso_session", "sso_start_url", "credential_process")


def profile_settings(name: str | None) -> dict[str, Any]:
    """What the profile `name` (else $AWS_PROFILE, else `default`) says, in obstore's words.

    Keys in the environment win over a profile that nobody named. Raises ConfigError for a profile that was
    named and is missing, or needs what is not supported here.
    """
    named = name or os.environ.get("AWS_PROFILE")
    if not named and "AWS_ACCESS_KEY_ID" in os.environ:
        return {}
    wanted = named or "default"
    section = {
        **_section(os.environ.get("AWS_CONFIG_FILE", "~/.aws/config"), wanted, f"profile {wanted}"),
        **_section(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), wanted),
    }
    if named and not section:
        raise ConfigError(f"AWS profile {named!r} is in neither ~/.aws/credentials nor ~/.aws/config")
    if "aws_access_key_id" not in section and (needs := [key for key in _UNSUPPORTED if key in section]):
        raise ConfigError(
            f"AWS profile {wanted!r} uses {needs[0]}, which is not supported",
            hint="Give static keys, an instance role, or AWS_ACCESS_KEY_ID and its like in the environment.",
        )
    names = {
        "aws_access_key_id": "access_key_id",
        "aws_secret_access_key": "secret_access_key",
        "aws_session_token": "session_token",
        "region": "region",
        "endpoint_url": "endpoint",
    }
    return {ours: section[theirs] for theirs, ours in names.items() if section.get(theirs)}


def _section(path: str, *names: str) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(Path(path).expanduser(), encoding="utf-8")
    except (configparser.Error, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return next((dict(parser[name]) for name in names if parser.has_section(name)), {})
