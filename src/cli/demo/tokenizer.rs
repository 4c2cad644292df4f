//! A byte-level BPE tokenizer, trained on a few paragraphs: the `tokenizer.json` that tokenizers and transformers read.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Value, json};

/// The first ids, in this order.
pub(super) const SPECIAL: [&str; 3] = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"];
/// The most pairs that are learned.
const MOST_MERGES: usize = 253;

/// What is learned from. Any text will do: every byte has a token of its own.
const TEXT: &str = "\
A model is a directory: a few small files that say what it is, and a few large ones that hold its weights. \
A registry keeps the same files as blobs, each under the digest of its content. To start a model, one pulls \
every blob, unpacks it, and reads it again; the engine waits, and the disk holds everything twice. \
A file system can do better. It shows the directory at once, because the names and sizes are in the manifest. \
It fetches the bytes that are read, in the order in which they are read, and the rest behind them. It keeps \
what it fetched, so that the second start reads from the local disk, and it checks every blob against its \
digest when the blob is whole. The engine notices nothing of this: it opens a file and reads the file. \
The header of a weight file tells where each tensor is. A reader who wants one tensor reads the header and \
then the tensor, and the file system fetches the header and then the tensor, and nothing else. \
What the reader of the directory sees is what the one who pushed the directory saw: the same names, the same \
bytes, the same digests. When the network fails the reader waits; when the content is wrong the read fails; \
wrong bytes are never handed on as if they were right. ";

/// A vocabulary and its merges, in the order in which they were learned.
#[derive(Debug)]
pub(super) struct Bpe {
    vocabulary: Vec<String>,
    merges: Vec<(String, String)>,
}

impl Bpe {
    /// Learns from [`TEXT`].
    pub(super) fn train() -> Self {
        let alphabet = byte_alphabet();
        let mut vocabulary: Vec<String> = SPECIAL.iter().map(|token| (*token).to_owned()).collect();
        vocabulary.extend(alphabet.iter().map(char::to_string));
        // Words as the pre-tokenizer cuts them: a word has the space before it.
        let mut words: BTreeMap<Vec<String>, usize> = BTreeMap::new();
        for word in TEXT
            .split_inclusive(|c: char| !c.is_alphabetic())
            .map(str::trim_end)
        {
            let letters: String = word.chars().filter(|c| c.is_alphabetic()).collect();
            if !letters.is_empty() {
                let text = format!(" {letters}");
                let symbols = text
                    .bytes()
                    .map(|byte| alphabet[usize::from(byte)].to_string());
                *words.entry(symbols.collect()).or_default() += 1;
            }
        }
        let mut merges = Vec::new();
        while merges.len() < MOST_MERGES {
            let Some(pair) = most_frequent_pair(&words) else {
                break;
            };
            words = words
                .into_iter()
                .map(|(word, count)| (merge(&word, &pair), count))
                .collect();
            vocabulary.push(format!("{}{}", pair.0, pair.1));
            merges.push(pair);
        }
        Self { vocabulary, merges }
    }

    /// The number of tokens.
    pub(super) fn len(&self) -> usize {
        self.vocabulary.len()
    }

    /// `tokenizer.json`.
    pub(super) fn json(&self) -> Value {
        let added = SPECIAL.iter().enumerate().map(|(id, token)| {
            json!({ "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": true })
        });
        let vocabulary: serde_json::Map<String, Value> = self
            .vocabulary
            .iter()
            .enumerate()
            .map(|(id, token)| (token.clone(), json!(id)))
            .collect();
        let merges: Vec<String> = self
            .merges
            .iter()
            .map(|(left, right)| format!("{left} {right}"))
            .collect();
        let byte_level = |prefix: bool| json!({ "type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": true });
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added.collect::<Vec<_>>(),
            "normalizer": null,
            "pre_tokenizer": byte_level(false),
            "post_processor": byte_level(false),
            "decoder": byte_level(true),
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocabulary, "merges": merges,
            },
        })
    }
}

/// The pair of neighbours that occurs most often, at least twice; of equals the first in byte order.
fn most_frequent_pair(words: &BTreeMap<Vec<String>, usize>) -> Option<(String, String)> {
    let mut counts: HashMap<(&str, &str), usize> = HashMap::new();
    for (word, count) in words {
        for pair in word.windows(2) {
            *counts.entry((&pair[0], &pair[1])).or_default() += count;
        }
    }
    let best = counts
        .into_iter()
        .max_by(|(a, m), (b, n)| m.cmp(n).then_with(|| b.cmp(a)));
    best.filter(|(_, count)| *count > 1)
        .map(|((left, right), _)| (left.to_owned(), right.to_owned()))
}

fn merge(word: &[String], pair: &(String, String)) -> Vec<String> {
    let mut merged = Vec::with_capacity(word.len());
    let mut at = 0;
    while at < word.len() {
        if word[at] == pair.0 && word.get(at + 1) == Some(&pair.1) {
            merged.push(format!("{}{}", pair.0, pair.1));
            at += 2;
        } else {
            merged.push(word[at].clone());
            at += 1;
        }
    }
    merged
}

/// The visible character that stands for each byte in byte-level BPE: itself where it is visible in Latin-1, else
/// the next one from U+0100 on (the alphabet of the tokenizers library's `ByteLevel`).
fn byte_alphabet() -> [char; 256] {
    let mut next = 0x100;
    std::array::from_fn(|byte| {
        let visible = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let code = if visible {
            byte as u32
        } else {
            next += 1;
            next - 1
        };
        char::from_u32(code).expect("codes below U+0200 are characters")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_and_every_merge_has_a_token() {
        let bpe = Bpe::train();
        assert_eq!(bpe.len(), SPECIAL.len() + 256 + bpe.merges.len());
        assert!(bpe.merges.len() > 150, "{}", bpe.merges.len());
        let unique: std::collections::HashSet<_> = bpe.vocabulary.iter().collect();
        assert_eq!(unique.len(), bpe.len());
        for (at, (left, right)) in bpe.merges.iter().enumerate() {
            let position = |token: &String| {
                bpe.vocabulary
                    .iter()
                    .position(|known| known == token)
                    .unwrap()
            };
            assert!(
                position(left).max(position(right)) < SPECIAL.len() + 256 + at,
                "{left} {right}"
            );
        }
        assert!(
            bpe.vocabulary.contains(&"\u{120}the".to_owned()),
            "a frequent word became a token"
        );
        assert_eq!(byte_alphabet()[usize::from(b' ')], '\u{120}');
        assert_eq!(byte_alphabet()[usize::from(b'\n')], '\u{10a}');
    }
}
