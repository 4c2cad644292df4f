//! Which token comes next: pure functions of logits, settings and a seeded generator.

use std::collections::HashMap;

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0: always the likeliest. Else logits are divided by it.
    pub temperature: f64,
    /// Only the likeliest tokens that together have this probability; 1: all.
    pub top_p: f64,
    /// Only this many of the likeliest tokens; 0: all.
    pub top_k: usize,
    /// Logits of tokens that have been seen are made smaller by this factor; 1: not.
    pub repetition_penalty: f64,
    /// What is taken from the logit of a generated token for each time that it was.
    pub frequency_penalty: f64,
    /// What is taken from the logit of a generated token once.
    pub presence_penalty: f64,
    /// What is added to the logits of some tokens.
    pub bias: Vec<(u32, f32)>,
    /// The same seed, prompt and settings give the same tokens.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            bias: Vec::new(),
            seed: 0,
        }
    }
}

/// Chooses one token after the other.
#[derive(Debug)]
pub struct Sampler {
    settings: Sampling,
    state: u64,
}

impl Sampler {
    /// At the beginning of a text.
    pub fn new(settings: Sampling) -> Self {
        Self {
            state: settings.seed,
            settings,
        }
    }

    /// The next token. `prompt` and `generated` are what came before; `logits` is overwritten.
    pub fn next(&mut self, logits: &mut [f32], prompt: &[u32], generated: &[u32]) -> u32 {
        self.adjust(logits, prompt, generated);
        if self.settings.temperature <= 0.0 {
            return likeliest(logits);
        }
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let by_logit = |a: &u32, b: &u32| {
            logits[*b as usize]
                .total_cmp(&logits[*a as usize])
                .then(a.cmp(b))
        };
        let most = match self.settings.top_k {
            0 => order.len(),
            k => k.min(order.len()),
        };
        if most < order.len() {
            order.select_nth_unstable_by(most, by_logit);
            order.truncate(most);
        }
        order.sort_unstable_by(by_logit);
        let highest = f64::from(logits[order[0] as usize]);
        let mut weights: Vec<f64> = order
            .iter()
            .map(|id| {
                ((f64::from(logits[*id as usize]) - highest) / self.settings.temperature).exp()
            })
            .collect();
        let total: f64 = weights.iter().sum();
        let mut sum = 0.0;
        // The one that crosses the line still counts, so there is always one.
        let kept = weights
            .iter()
            .position(|weight| {
                sum += weight;
                sum >= self.settings.top_p * total
            })
            .map_or(weights.len(), |last| last + 1);
        weights.truncate(kept);
        let mut left = self.uniform() * weights.iter().sum::<f64>();
        for (weight, id) in weights.iter().zip(&order) {
            left -= weight;
            if left < 0.0 {
                return *id;
            }
        }
        order[kept - 1]
    }

    fn adjust(&self, logits: &mut [f32], prompt: &[u32], generated: &[u32]) {
        let settings = &self.settings;
        if settings.repetition_penalty != 1.0 {
            let mut seen: Vec<u32> = prompt.iter().chain(generated).copied().collect();
            seen.sort_unstable();
            seen.dedup();
            for id in seen {
                if let Some(logit) = logits.get_mut(id as usize) {
                    let penalty = settings.repetition_penalty as f32;
                    *logit = if *logit > 0.0 {
                        *logit / penalty
                    } else {
                        *logit * penalty
                    };
                }
            }
        }
        if settings.frequency_penalty != 0.0 || settings.presence_penalty != 0.0 {
            let mut counts: HashMap<u32, f64> = HashMap::new();
            for id in generated {
                *counts.entry(*id).or_default() += 1.0;
            }
            for (id, count) in counts {
                if let Some(logit) = logits.get_mut(id as usize) {
                    *logit -=
                        (count * settings.frequency_penalty + settings.presence_penalty) as f32;
                }
            }
        }
        for (id, bias) in &settings.bias {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit += bias;
            }
        }
    }

    /// From 0 up to but not including 1 (SplitMix64).
    fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The token with the highest logit; the first of equals, as argmax has it elsewhere.
pub fn likeliest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(settings: &Sampling, count: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(settings.clone());
        let mut counts = vec![0; 4];
        for _ in 0..count {
            // Probabilities 0.1, 0.4, 0.2, 0.3.
            let mut logits: Vec<f32> = [0.1f32, 0.4, 0.2, 0.3].iter().map(|p| p.ln()).collect();
            counts[sampler.next(&mut logits, &[], &[]) as usize] += 1;
        }
        counts
    }

    #[test]
    fn tokens_come_as_often_as_they_are_likely() {
        let at = |temperature, top_p, top_k| {
            draw(
                &Sampling {
                    temperature,
                    top_p,
                    top_k,
                    seed: 7,
                    ..Sampling::default()
                },
                10_000,
            )
        };
        for (got, wanted) in at(1.0, 1.0, 0).iter().zip([1000, 4000, 2000, 3000]) {
            assert!(got.abs_diff(wanted) < 200, "{got} {wanted}");
        }
        assert_eq!(at(0.0, 1.0, 0), [0, 10_000, 0, 0], "greedy");
        let two = at(1.0, 1.0, 2);
        assert_eq!((two[0], two[2]), (0, 0), "top-k keeps the two likeliest");
        assert!(two[1].abs_diff(5714) < 200);
        assert_eq!(
            at(1.0, 0.69, 0),
            two,
            "0.4 + 0.3 is the least that reaches 0.69"
        );
        assert_eq!(at(1.0, 1e-9, 0), [0, 10_000, 0, 0], "one is always left");
        assert!(at(100.0, 1.0, 0)[0] > 2300, "heat makes all alike");
    }

    #[test]
    fn a_seed_decides() {
        let first = |seed| {
            draw(
                &Sampling {
                    temperature: 1.0,
                    seed,
                    ..Sampling::default()
                },
                50,
            )
        };
        assert_eq!(first(1), first(1));
        assert_ne!(first(1), first(2));
    }

    #[test]
    fn penalties_and_bias_move_logits() {
        let next = |settings: Sampling, generated: &[u32]| {
            Sampler::new(settings).next(&mut [1.0, 2.0, -1.0, 1.9], &[1], generated)
        };
        assert_eq!(next(Sampling::default(), &[]), 1);
        assert_eq!(
            next(
                Sampling {
                    repetition_penalty: 1.2,
                    ..Sampling::default()
                },
                &[]
            ),
            3
        );
        assert_eq!(
            next(
                Sampling {
                    presence_penalty: 0.5,
                    ..Sampling::default()
                },
                &[]
            ),
            1,
            "the prompt does not count"
        );
        assert_eq!(
            next(
                Sampling {
                    frequency_penalty: 0.1,
                    ..Sampling::default()
                },
                &[1, 1]
            ),
            3
        );
        assert_eq!(
            next(
                Sampling {
                    bias: vec![(2, 9.0), (99, 9.0)],
                    ..Sampling::default()
                },
                &[]
            ),
            2
        );
    }
}
