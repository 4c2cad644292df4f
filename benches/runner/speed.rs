//! Prompts and tokens a second on a small published model.

use ocifs::runner::text::Text;

use crate::Bench;
use crate::common::in_turn;
use crate::common::table::{Bar, Table, Unit};
use crate::peers::{Answer, Engine, Peer};

/// The model, as the table calls it.
const MODEL: &str = "135M bf16";
/// Tokens of the long prompt.
const PROMPT: usize = 512;

/// Somebody with a turn: a name, and how much faster we have to be in tokens and in prompts.
struct Contestant {
    name: &'static str,
    engine: Engine,
    bars: [Bar; 2],
}

/// In turn, each a short prompt with many tokens and a long one with a token.
pub(crate) fn measure(bench: &Bench, table: &mut Table) {
    let model = &bench.smollm;
    let text = Text::open(model).unwrap();
    let readme = include_str!("../../README.md");
    let long = text.tokens(readme, false).unwrap()[..PROMPT].to_vec();
    let short = text.tokens("The capital of France is", false).unwrap();
    let count = bench.options.scaled(128, 48);

    let file = bench.dir.join("smollm2.gguf");
    let source = crate::gguf::source(&crate::environment("OCIFS_TEST_ENV", "ocifs-tests"));
    crate::gguf::widen(&source, &file);
    let twice = Bar::at_least(2.0);
    let mut contestants = vec![Contestant {
        name: "ocifs-run",
        engine: Engine::Ours {
            model: model.clone(),
            prompt: bench.dir.join("prompt.json"),
        },
        bars: [Bar::NONE; 2],
    }];
    let mut add = |name, peer: Option<Peer>, bars, how| match peer {
        Some(peer) => contestants.push(Contestant {
            name,
            engine: Engine::Peer(peer),
            bars,
        }),
        None => table.leave_out(name, how),
    };
    let setup = "benches/setup.sh installs it";
    let prompt = Bar::at_least(1.0);
    add(
        "transformers f32",
        Peer::transformers(model, "f32"),
        [twice, prompt],
        setup,
    );
    add(
        "transformers bf16",
        Peer::transformers(model, "bf16"),
        [Bar::SHOWN; 2],
        setup,
    );
    let build = "benches/setup.sh makes it";
    add(
        "candle-transformers f32",
        Peer::candle(model, "f32"),
        [twice, Bar::SHOWN],
        build,
    );
    add(
        "candle-transformers f16",
        Peer::candle(model, "f16"),
        [Bar::SHOWN; 2],
        build,
    );
    add(
        "llama.cpp bf16",
        Peer::llama(&file),
        [Bar::SHOWN; 2],
        "tests/setup.sh installs it",
    );
    // Once each without a clock.
    for contestant in &mut contestants {
        contestant.engine.ask(&long, 4);
    }
    let order: Vec<usize> = (0..contestants.len()).collect();
    for round in bench.options.turns("speed") {
        let mut answers = vec![None; contestants.len()];
        for at in in_turn(round, &order) {
            let engine = &mut contestants[at].engine;
            answers[at] = Some((engine.ask(&short, count), engine.ask(&long, 1)));
        }
        let answers: Vec<(Answer, Answer)> = answers.into_iter().flatten().collect();
        let (ours, ours_long) = &answers[0];
        for (contestant, (tokens, prompt)) in contestants.iter().zip(&answers) {
            let name = contestant.name;
            // The beginning is no matter of rounding: whoever says something else runs another model.
            assert_eq!(
                tokens.tokens[..4],
                ours.tokens[..4],
                "{name} and ours differ"
            );
            let rate = PROMPT as f64 / prompt.first;
            table.add_with_bar(
                Unit::TokensPerSecond,
                MODEL,
                &format!("{name}, generated"),
                Bar::SHOWN,
                tokens.rate,
            );
            table.add_with_bar(
                Unit::TokensPerSecond,
                MODEL,
                &format!("{name}, prompt of {PROMPT}"),
                Bar::SHOWN,
                rate,
            );
            if matches!(contestant.engine, Engine::Ours { .. }) {
                continue;
            }
            let [generated, prompted] = contestant.bars;
            table.ratio(
                MODEL,
                &format!("generated tokens/s ÷ {name}"),
                generated,
                ours.rate / tokens.rate,
            );
            table.ratio(
                MODEL,
                &format!("prompt of {PROMPT}, tokens/s ÷ {name}"),
                prompted,
                prompt.first / ours_long.first,
            );
        }
    }
}
