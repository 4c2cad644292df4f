//! Rotary positions: which angle each pair of a head's elements turns by per position.

use std::f64::consts::PI;

use serde_json::Value;

use super::error::{Error, Result};

/// One angle a pair, per position.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// `head_dim / 2` of them, the fastest first.
    pub frequencies: Vec<f32>,
}

impl Rope {
    /// Reads `rope_parameters` or `rope_scaling`; `theta` is what is written outside of it.
    ///
    /// # Errors
    /// `Unsupported` for another scheme than default, linear and llama3.
    pub(super) fn parse(
        parameters: Option<&Value>,
        theta: f64,
        head_dim: usize,
        positions: usize,
    ) -> Result<Self> {
        let number = |name: &str| {
            parameters
                .and_then(|all| all.get(name))
                .and_then(Value::as_f64)
        };
        let kind = parameters
            .and_then(|all| all.get("rope_type").or_else(|| all.get("type")))
            .and_then(Value::as_str)
            .unwrap_or("default");
        let theta = number("rope_theta").unwrap_or(theta);
        let needed = |name: &str| {
            number(name).filter(|value| *value > 0.0).ok_or_else(|| {
                Error::Unsupported(format!("its rope is `{kind}` without a usable `{name}`"))
            })
        };
        if theta <= 0.0 {
            return Err(Error::Unsupported(format!("its rope_theta is {theta}")));
        }
        if number("partial_rotary_factor").is_some_and(|factor| factor != 1.0) {
            return Err(Error::Unsupported(
                "only a part of each head is rotated (partial_rotary_factor)".to_owned(),
            ));
        }
        let plain =
            (0..head_dim / 2).map(|pair| theta.powf(-((2 * pair) as f64) / head_dim as f64));
        let frequencies: Vec<f64> = match kind {
            "default" => plain.collect(),
            "linear" => {
                let factor = needed("factor")?;
                plain.map(|frequency| frequency / factor).collect()
            }
            "llama3" => {
                let llama3 = Llama3 {
                    factor: needed("factor")?,
                    low: needed("low_freq_factor")?,
                    high: needed("high_freq_factor")?,
                    original: number("original_max_position_embeddings")
                        .unwrap_or(positions as f64),
                };
                if llama3.high <= llama3.low {
                    return Err(Error::Unsupported(
                        "its llama3 rope has factors in the wrong order".to_owned(),
                    ));
                }
                plain.map(|frequency| llama3.stretch(frequency)).collect()
            }
            other => {
                return Err(Error::Unsupported(format!(
                    "its rope is `{other}`; known are default, linear and llama3"
                )));
            }
        };
        Ok(Self {
            frequencies: frequencies
                .into_iter()
                .map(|frequency| frequency as f32)
                .collect(),
        })
    }
}

/// Slow pairs are stretched by a factor, fast ones are left, and those between get some of both.
struct Llama3 {
    factor: f64,
    low: f64,
    high: f64,
    original: f64,
}

impl Llama3 {
    fn stretch(&self, frequency: f64) -> f64 {
        let turns = self.original * frequency / (2.0 * PI);
        if turns < self.low {
            frequency / self.factor
        } else if turns > self.high {
            frequency
        } else {
            let share = (turns - self.low) / (self.high - self.low);
            (1.0 - share) * frequency / self.factor + share * frequency
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_fastest_pair_turns_by_one_and_each_next_by_less() {
        let rope = Rope::parse(None, 1e4, 8, 64).unwrap();
        for (got, wanted) in rope.frequencies.iter().zip([1.0, 0.1, 0.01, 0.001]) {
            assert!((got - wanted).abs() < 1e-7, "{got} {wanted}");
        }
    }

    #[test]
    fn llama3_leaves_fast_pairs_and_stretches_slow_ones() {
        let settings = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192});
        let plain = Rope::parse(None, 5e5, 128, 131_072).unwrap().frequencies;
        let scaled = Rope::parse(Some(&settings), 5e5, 128, 131_072)
            .unwrap()
            .frequencies;
        assert_eq!(plain[0], scaled[0]);
        assert!((plain[63] / scaled[63] - 8.0).abs() < 1e-5);
        assert!(
            scaled.windows(2).all(|pair| pair[0] > pair[1]),
            "no pair overtakes another"
        );
    }
}
