//! How often rounding changes which token is the likeliest: the yardstick is transformers in f32, with the same weights of bf16.

use ocifs::runner::text::Text;

use crate::Bench;
use crate::common::table::{Bar, Table};
use crate::peers::{Peer, our_choices};

const MODEL: &str = "135M bf16";

/// Prose, code and a licence: a text a figure.
const TEXTS: [&str; 3] = [
    include_str!("../../README.md"),
    include_str!("../../src/runner/engine.rs"),
    include_str!("../../LICENSE-APACHE"),
];

/// Both against f32, once a text.
pub(crate) fn measure(bench: &Bench, table: &mut Table) {
    let model = &bench.smollm;
    let peers = ["f32", "bf16"].map(|dtype| Peer::transformers(model, dtype));
    let [Some(mut exact), Some(mut rounded)] = peers else {
        table.leave_out("choices of transformers", "benches/setup.sh installs it");
        return;
    };
    let length = bench.options.scaled(1024, 256);
    let text = Text::open(model).unwrap();
    for prompt in TEXTS {
        let mut prompt = text.tokens(prompt, false).unwrap();
        prompt.truncate(length);
        let wanted = exact.choices(&prompt);
        for (what, choices, bar) in [
            (
                "likeliest token as in transformers f32: ocifs-run",
                our_choices(model, &prompt, &bench.dir),
                Bar::at_least(0.99),
            ),
            (
                "likeliest token as in transformers f32: transformers bf16",
                rounded.choices(&prompt),
                Bar::SHOWN,
            ),
        ] {
            let same = choices.iter().zip(&wanted).filter(|(a, b)| a == b).count();
            table.ratio(MODEL, what, bar, same as f64 / wanted.len() as f64);
        }
    }
}
