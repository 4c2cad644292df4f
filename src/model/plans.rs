//! The plans of models that were opened lately, by digest. Bounded in number and in memory.

use std::collections::HashMap;
use std::sync::Arc;

use crate::base::Digest;

use super::plan::Plan;

/// Most plans that are kept.
const MOST: usize = 256;
/// Most files in all plans that are kept.
const MOST_WEIGHT: usize = 1_000_000;

/// Plans, the least recently used of which go first.
#[derive(Debug, Default)]
pub(super) struct Plans {
    plans: HashMap<Digest, (Arc<Plan>, u64)>,
    clock: u64,
}

impl Plans {
    /// The plan of this digest, which is thereby used.
    pub(super) fn get(&mut self, digest: &Digest) -> Option<Arc<Plan>> {
        self.clock += 1;
        let (plan, used) = self.plans.get_mut(digest)?;
        *used = self.clock;
        Some(Arc::clone(plan))
    }

    /// Keeps a plan.
    pub(super) fn insert(&mut self, plan: Arc<Plan>) {
        self.clock += 1;
        self.plans.insert(plan.digest, (plan, self.clock));
        while self.plans.len() > 1 && (self.plans.len() > MOST || self.weight() > MOST_WEIGHT) {
            let oldest = self
                .plans
                .iter()
                .min_by_key(|(_, (_, used))| *used)
                .map(|(digest, _)| *digest);
            if let Some(oldest) = oldest {
                self.plans.remove(&oldest);
            }
        }
    }

    fn weight(&self) -> usize {
        self.plans.values().map(|(plan, _)| plan.weight()).sum()
    }
}
