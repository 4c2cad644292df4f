"""Pushes files as an artifact: push_oras.py HOST TARGET TOKEN CONFIG:TYPE FILE:TYPE... (empty TOKEN: none)."""

import sys

import oras.client


def main() -> None:
    host, target, token, config, *files = sys.argv[1:]
    client = oras.client.OrasClient(hostname=host, insecure=True)
    if token:
        # By itself oras asks for a token that may only pull, and does not ask again when the registry wants more.
        client.auth.set_token_auth(token)
    answer = client.push(target=f"{host}/{target}", files=files, manifest_config=config, disable_path_validation=True)
    print(answer.headers.get("Docker-Content-Digest", ""))


main()
