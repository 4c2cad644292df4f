//! Names for safetensors layers that have none: the packaged index's, proved by each layer's own tensor names.
//!
//! The first packagers of Docker's v0.1 format wrote no names, but sorted the shards and put the index into the config
//! tar. An index that is visible makes engines ignore shards under other names, so a name is never guessed: a layer gets
//! a shard's name when it holds every tensor that the index puts there. Packaging order follows from that; it is not
//! needed as evidence, and does not mislead where the source had further files (`consolidated.safetensors`).

use std::collections::{BTreeMap, BTreeSet};

use super::index::WeightMap;
use super::notes::quote;

/// The names of nameless layers, in layer order, and what is to be said about them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Assignment {
    /// One name per layer, all different.
    pub(super) names: Vec<String>,
    /// What did not fit.
    pub(super) notes: Vec<String>,
}

/// Model-runner's name of shard `n` (from 1) of `count`.
pub(super) fn plain_name(n: usize, count: usize, extension: &str) -> String {
    match count {
        1 => format!("model{extension}"),
        _ => format!("model-{n:05}-of-{count:05}{extension}"),
    }
}

/// Names `count` layers without any index.
pub(super) fn without_index(count: usize, taken: &BTreeSet<&str>) -> Assignment {
    let mut names = Vec::with_capacity(count);
    for n in 1..=count {
        names.push(free_name(n, count, taken, &BTreeMap::new()));
    }
    Assignment {
        names,
        notes: Vec::new(),
    }
}

/// Names layers by an index. `layers` are the tensor names of each (`None` where the header is malformed), `taken` the
/// paths that other layers have.
pub(super) fn with_index(
    index: &WeightMap,
    layers: &[Option<Vec<String>>],
    taken: &BTreeSet<&str>,
) -> Assignment {
    let wanted = index.tensors_per_shard();
    let mut proved = Vec::new();
    for (layer, tensors) in layers.iter().enumerate() {
        let Some(tensors) = tensors else { continue };
        let mut held: BTreeMap<&str, usize> = BTreeMap::new();
        for shard in tensors.iter().filter_map(|tensor| index.shard(tensor)) {
            *held.entry(shard).or_insert(0) += 1;
        }
        // Tensor names are unique in a header, so equal counts mean that all of the shard's tensors are there.
        let complete = held
            .into_iter()
            .filter(|(shard, count)| wanted.get(shard) == Some(count) && !taken.contains(shard));
        proved.extend(complete.map(|(shard, count)| (tensors.len() - count, layer, shard)));
    }
    // Who holds the shard and the least beside it has the best claim: a file of all weights beside the shards holds
    // every one of them, and is none.
    proved.sort_unstable();
    let mut holder: BTreeMap<&str, usize> = BTreeMap::new();
    let mut names: Vec<Option<&str>> = vec![None; layers.len()];
    for (_, layer, shard) in proved {
        if names[layer].is_none() && !holder.contains_key(shard) {
            holder.insert(shard, layer);
            names[layer] = Some(shard);
        }
    }
    let mut notes = Vec::new();
    let names = names.iter().enumerate().map(|(layer, name)| {
        if let Some(name) = name {
            return (*name).to_owned();
        }
        let name = free_name(layer + 1, layers.len(), taken, &wanted);
        let why = match &layers[layer] {
            None => "its header is malformed",
            Some(_) => "it does not hold the tensors of any shard that the index names",
        };
        notes.push(format!(
            "safetensors layer {} is shown as {}: {why}",
            layer + 1,
            quote(&name)
        ));
        name
    });
    let names = names.collect();
    let missing = wanted
        .keys()
        .filter(|shard| !holder.contains_key(*shard) && !taken.contains(*shard));
    let missing: Vec<String> = missing.map(|shard| quote(shard)).collect();
    if !missing.is_empty() {
        let some = missing
            .iter()
            .take(5)
            .map(String::as_str)
            .collect::<Vec<_>>()
            .join(", ");
        notes.push(format!(
            "the index names {} shards that no layer was found to be, such as {some}",
            missing.len()
        ));
    }
    Assignment { names, notes }
}

/// A name that neither another file nor the index uses. It depends on the layer's number alone, so no two are equal.
fn free_name(
    n: usize,
    count: usize,
    taken: &BTreeSet<&str>,
    indexed: &BTreeMap<&str, usize>,
) -> String {
    let is_free = |name: &str| !taken.contains(name) && !indexed.contains_key(name);
    let plain = plain_name(n, count, super::index::EXTENSION);
    if is_free(&plain) {
        return plain;
    }
    let prefixes = (0_usize..).map(|round| {
        if round == 0 {
            "layer".to_owned()
        } else {
            format!("layer{round}")
        }
    });
    let mut names =
        prefixes.map(|prefix| format!("{prefix}-{n:05}-of-{count:05}{}", super::index::EXTENSION));
    names
        .find(|name| is_free(name))
        .expect("taken and indexed are finite")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(entries: &[(&str, &str)]) -> WeightMap {
        let map: BTreeMap<_, _> = entries.iter().copied().collect();
        WeightMap::parse(
            serde_json::json!({"weight_map": map})
                .to_string()
                .as_bytes(),
        )
        .unwrap()
    }

    fn layers(layers: &[&[&str]]) -> Vec<Option<Vec<String>>> {
        layers
            .iter()
            .map(|names| Some(names.iter().map(|name| (*name).to_owned()).collect()))
            .collect()
    }

    const TWO: [(&str, &str); 3] = [
        ("a", "model-00001-of-00002.safetensors"),
        ("b", "model-00002-of-00002.safetensors"),
        ("c", "model-00002-of-00002.safetensors"),
    ];

    #[test]
    fn layers_get_the_names_that_their_tensors_prove() {
        let none = BTreeSet::new();
        let in_order = with_index(&index(&TWO), &layers(&[&["a"], &["b", "c"]]), &none);
        assert_eq!(
            in_order.names,
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors"
            ]
        );
        assert!(in_order.notes.is_empty());
        let swapped = with_index(
            &index(&TWO),
            &layers(&[&["c", "b"], &["a", "not in the index"]]),
            &none,
        );
        assert_eq!(
            swapped.names,
            [
                "model-00002-of-00002.safetensors",
                "model-00001-of-00002.safetensors"
            ]
        );
        assert!(swapped.notes.is_empty());
        let single = with_index(
            &index(&[("a", "weights.safetensors")]),
            &layers(&[&["a"]]),
            &none,
        );
        assert_eq!(single.names, ["weights.safetensors"]);
    }

    #[test]
    fn a_further_file_sorted_before_the_shards_does_not_mislead() {
        let named = with_index(
            &index(&TWO),
            &layers(&[&["all.of.it"], &["a"], &["b", "c"]]),
            &BTreeSet::new(),
        );
        assert_eq!(
            named.names,
            [
                "model-00001-of-00003.safetensors",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors"
            ]
        );
        assert_eq!(named.notes.len(), 1);
    }

    #[test]
    fn a_file_of_all_weights_is_not_taken_for_one_of_the_shards() {
        let named = with_index(
            &index(&TWO),
            &layers(&[&["a", "b", "c"], &["a"], &["b", "c"]]),
            &BTreeSet::new(),
        );
        assert_eq!(
            named.names,
            [
                "model-00001-of-00003.safetensors",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors"
            ]
        );
        // With nothing better at hand, it serves as the shard that it holds most of.
        let alone = with_index(&index(&TWO), &layers(&[&["a", "b", "c"]]), &BTreeSet::new());
        assert_eq!(alone.names, ["model-00002-of-00002.safetensors"]);
    }

    #[test]
    fn what_is_not_proved_gets_a_name_that_the_index_does_not_use() {
        let mut damaged = layers(&[&["a"], &["b"]]);
        let incomplete = with_index(&index(&TWO), &damaged, &BTreeSet::new());
        assert_eq!(
            incomplete.names,
            [
                "model-00001-of-00002.safetensors",
                "layer-00002-of-00002.safetensors"
            ]
        );
        assert!(
            incomplete
                .notes
                .iter()
                .any(|note| note.contains("`model-00002-of-00002.safetensors`"))
        );
        damaged[1] = None;
        assert!(
            with_index(&index(&TWO), &damaged, &BTreeSet::new()).notes[0].contains("malformed")
        );
    }

    #[test]
    fn names_stay_unique() {
        let twice = with_index(&index(&TWO), &layers(&[&["a"], &["a"]]), &BTreeSet::new());
        assert_eq!(
            twice.names,
            [
                "model-00001-of-00002.safetensors",
                "layer-00002-of-00002.safetensors"
            ]
        );
        let taken = BTreeSet::from([
            "model-00001-of-00002.safetensors",
            "layer-00001-of-00002.safetensors",
        ]);
        let avoided = with_index(&index(&TWO), &layers(&[&["a"], &["b", "c"]]), &taken);
        assert_eq!(avoided.names[0], "layer1-00001-of-00002.safetensors");
        assert_eq!(
            without_index(2, &taken).names[0],
            "layer1-00001-of-00002.safetensors"
        );
    }

    #[test]
    fn without_an_index_the_names_are_those_of_model_runner() {
        assert_eq!(
            without_index(1, &BTreeSet::new()).names,
            ["model.safetensors"]
        );
        let three = without_index(3, &BTreeSet::new()).names;
        assert_eq!(three[2], "model-00003-of-00003.safetensors");
    }
}
