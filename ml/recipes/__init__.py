"""One TOML file an encoder, holding what differs from ml.config.Recipe's defaults."""
