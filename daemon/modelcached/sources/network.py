"""What every connection to the outside is made with, whoever makes it: whom we believe, and through whom we go."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from modelcached.config import ConfigError
from modelcached.sources.proxies import Proxies


@dataclass(frozen=True, slots=True)
class Network:
    """For API questions and bytes alike."""

    tls: ssl.SSLContext
    proxies: Proxies

    @classmethod
    def of(cls, ca_file: Path | None, environment: Mapping[str, str]) -> Self:
        """The system's authorities (SSL_CERT_FILE and SSL_CERT_DIR name others), those of ``ca_file``, and proxies.

        Raises ConfigError that names the setting.
        """
        tls = ssl.create_default_context()
        if ca_file is not None:
            try:
                tls.load_verify_locations(cafile=ca_file)
            except (OSError, ssl.SSLError) as error:
                why = error.strerror or "it holds no certificate in PEM form"
                raise ConfigError(f"hub.ca_file: {ca_file}: {why}") from error
        return cls(tls, Proxies.of(environment))
