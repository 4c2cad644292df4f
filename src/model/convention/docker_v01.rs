//! Docker's model format v0.1: safetensors or GGUF layers, mostly without names, and the rest in a config tar.
//!
//! Sources: docker/model-spec (spec.md, config.md) for the types; model-runner's bundle unpacker for the names and the
//! order: weights and single files first, then the config tar over them, then directory tars, then further files.

use super::{
    CONFIG_TAR, Clash, Convention, Manifest, Role, SMALL_TAR, Step, Under, file_path, keep,
    nameless,
};
use crate::model::shards::plain_name;

pub(super) static CONVENTION: Convention = Convention {
    name: "Docker model v0.1",
    recognises: |manifest| {
        manifest.config.media_type == "application/vnd.docker.ai.model.config.v0.1+json"
    },
    needs_config: false,
    steps,
    extras: None,
};

/// What follows the prefix of all of Docker's layer types.
fn kind(media_type: &str) -> Option<&str> {
    media_type.strip_prefix("application/vnd.docker.ai.")
}

/// A tar whose links are not shown, as model-runner has it.
pub(super) fn unlinked(whole_up_to: u64) -> Role {
    Role::Tar {
        required: true,
        whole_up_to,
        under: Under::Top,
        links: false,
        otherwise: None,
    }
}

fn steps(manifest: &Manifest, _config: &[u8]) -> Vec<Step> {
    let layers = || manifest.layers.iter().enumerate();
    let ggufs = layers()
        .filter(|(_, layer)| kind(&layer.media_type) == Some("gguf.v3"))
        .count();
    let (mut gguf, mut licenses, mut loras) = (0, 0, 0);
    let (mut files, mut tars, mut last) = (Vec::new(), Vec::new(), Vec::new());
    let mut has_config = false;
    for (n, layer) in layers() {
        let path = file_path(layer).map(str::to_owned);
        let file = |name: &str| Role::File(name.to_owned());
        let named =
            |path: Option<String>| path.map_or_else(|| Role::Hidden(nameless()), Role::File);
        match kind(&layer.media_type) {
            Some("safetensors") => {
                files.push(keep(n, path.map_or(Role::NamelessShard, Role::File)))
            }
            Some("gguf.v3") => {
                gguf += 1;
                files.push(keep(n, Role::File(plain_name(gguf, ggufs, ".gguf"))));
            }
            // Of the specification only: model-runner knows no name for it.
            Some("gguf.v3.lora") => {
                loras += 1;
                let name = match loras {
                    1 => "lora.gguf".to_owned(),
                    n => format!("lora-{n}.gguf"),
                };
                files.push(keep(n, Role::File(path.unwrap_or(name))));
            }
            Some("mmproj" | "gguf.v3.mmproj") => files.push(keep(n, file("model.mmproj"))),
            Some("chat.template.jinja") => files.push(keep(n, file("template.jinja"))),
            Some("dduf") => {
                files.push(keep(n, path.map_or_else(|| file("model.dduf"), Role::File)))
            }
            Some("license") => {
                licenses += 1;
                let name = if licenses == 1 {
                    "LICENSE".to_owned()
                } else {
                    format!("LICENSE-{licenses}")
                };
                files.push(keep(n, Role::File(path.unwrap_or(name))));
            }
            Some("vllm.config.tar") => {
                // Model-runner takes one config tar; a second adds files and changes none.
                let clash = if has_config {
                    Clash::KeepFirst
                } else {
                    Clash::Replace
                };
                has_config = true;
                tars.push((
                    0,
                    Step {
                        layer: n,
                        role: unlinked(CONFIG_TAR),
                        clash,
                    },
                ));
            }
            Some("dir.tar") => {
                let role = unlinked(SMALL_TAR);
                tars.push((
                    1,
                    Step {
                        layer: n,
                        role,
                        clash: Clash::Replace,
                    },
                ));
            }
            _ => last.push(keep(n, named(path))),
        }
    }
    tars.sort_by_key(|(order, _)| *order);
    files
        .into_iter()
        .chain(tars.into_iter().map(|(_, step)| step))
        .chain(last)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn roles(layers: &[(&str, &[(&str, &str)])]) -> Vec<(usize, Role, Clash)> {
        let types: Vec<String> = layers
            .iter()
            .map(|(kind, _)| format!("application/vnd.docker.ai.{kind}"))
            .collect();
        let layers: Vec<_> = types
            .iter()
            .zip(layers)
            .map(|(t, (_, annotations))| (t.as_str(), 1, *annotations))
            .collect();
        steps(&Manifest::for_tests(&layers), &[])
            .into_iter()
            .map(|s| (s.layer, s.role, s.clash))
            .collect()
    }

    #[test]
    fn layers_without_names_get_those_of_model_runner() {
        let file = |n, name: &str| (n, Role::File(name.into()), Clash::KeepFirst);
        assert_eq!(
            roles(&[("gguf.v3", &[("org.cncf.model.filepath", "q4.gguf")])]),
            [file(0, "model.gguf")]
        );
        let kinds = [
            "gguf.v3",
            "license",
            "gguf.v3",
            "mmproj",
            "chat.template.jinja",
            "dduf",
            "license",
            "gguf.v3.lora",
            "gguf.v3.lora",
        ]
        .map(|k| (k, &[][..]));
        assert_eq!(
            roles(&kinds),
            [
                file(0, "model-00001-of-00002.gguf"),
                file(1, "LICENSE"),
                file(2, "model-00002-of-00002.gguf"),
                file(3, "model.mmproj"),
                file(4, "template.jinja"),
                file(5, "model.dduf"),
                file(6, "LICENSE-2"),
                file(7, "lora.gguf"),
                file(8, "lora-2.gguf"),
            ]
        );
    }

    #[test]
    fn tars_come_after_files_and_further_files_last() {
        let path: &[(&str, &str)] = &[("org.cncf.model.filepath", "x.py")];
        let shard: &[(&str, &str)] = &[("org.cncf.model.filepath", "m.safetensors")];
        let steps = roles(&[
            ("model.file", path),
            ("dir.tar", &[]),
            ("vllm.config.tar", &[]),
            ("safetensors", &[]),
            ("safetensors", shard),
            ("vllm.config.tar", &[]),
            ("new.kind", &[]),
        ]);
        let order: Vec<usize> = steps.iter().map(|(layer, ..)| *layer).collect();
        assert_eq!(order, [3, 4, 2, 5, 1, 0, 6]);
        assert_eq!(steps[0].1, Role::NamelessShard);
        assert_eq!(steps[1].1, Role::File("m.safetensors".into()));
        let clashes: Vec<Clash> = steps[2..5].iter().map(|(_, _, clash)| *clash).collect();
        assert_eq!(clashes, [Clash::Replace, Clash::KeepFirst, Clash::Replace]);
        assert!(matches!(steps[6].1, Role::Hidden(Some(_))));
    }
}
