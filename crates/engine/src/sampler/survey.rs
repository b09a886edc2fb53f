//! One look at all logits: every one is checked, the largest found, and of each stretch its largest kept, by which what can be
//! among the first k is told from what cannot. A maximum rounds nothing, so its order is free.

use super::SamplerError;

/// Logits that are looked at together.
pub(super) const LANES: usize = 16;
/// Stretches, about.
const STRETCHES: usize = 1024;

/// What was seen.
#[derive(Clone, Debug, Default)]
pub(super) struct Survey {
    /// The largest logit of each stretch.
    maxima: Vec<f32>,
    sorted: Vec<f32>,
}

impl Survey {
    /// The id of the largest logit, of equals the lowest.
    ///
    /// # Errors
    /// [`SamplerError::NonFinite`], [`SamplerError::NoLogits`].
    pub(super) fn look(&mut self, logits: &[f32]) -> Result<u32, SamplerError> {
        let length = logits.len().div_ceil(STRETCHES).next_multiple_of(LANES).max(LANES);
        let mut finite = true;
        self.maxima.clear();
        self.maxima.extend(logits.chunks(length).map(|stretch| {
            let (max, is_finite) = look_at(stretch);
            finite &= is_finite;
            max
        }));
        if !finite {
            return Err(SamplerError::non_finite(logits));
        }
        let max = self.maxima.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let at = |within: &[f32]| within.iter().position(|&logit| logit == max);
        let stretch = at(&self.maxima).ok_or(SamplerError::NoLogits)? * length;
        let best = stretch + at(&logits[stretch..]).ok_or(SamplerError::NoLogits)?;
        u32::try_from(best).map_err(|_| SamplerError::NoLogits)
    }

    /// A number that at least `k` of the logits reach, and few others: the k-th largest of the largest ones. None where there
    /// are not many more stretches than that, or `k` is 0.
    pub(super) fn reached_by(&mut self, k: usize) -> Option<f32> {
        if k == 0 || k > self.maxima.len() / 2 {
            return None;
        }
        self.sorted.clone_from(&self.maxima);
        let (_, &mut least, _) = self.sorted.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
        Some(least)
    }
}

/// The largest of a stretch, and whether all of it is finite.
fn look_at(stretch: &[f32]) -> (f32, bool) {
    /// Without its sign, a number that is not finite is at least this, by its bits.
    const INFINITE: i32 = f32::INFINITY.to_bits() as i32;
    // Lanes of one width, for the compiler to use vectors.
    let mut maxima = [f32::NEG_INFINITY; LANES];
    let mut magnitudes = [0; LANES];
    for chunk in stretch.chunks(LANES) {
        for ((&logit, max), magnitude) in chunk.iter().zip(&mut maxima).zip(&mut magnitudes) {
            *max = if logit > *max { logit } else { *max };
            *magnitude = (logit.abs().to_bits() as i32).max(*magnitude); // without a sign: not negative
        }
    }
    let finite = magnitudes.into_iter().all(|magnitude| magnitude < INFINITE);
    (maxima.into_iter().fold(f32::NEG_INFINITY, f32::max), finite)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_first_reach() {
        let spread =
            |n: u32| -> Vec<f32> { (0..n).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32).collect() };
        let check = |logits: &[f32], k: usize, few: usize| {
            let mut survey = Survey::default();
            survey.look(logits).expect("numbers");
            let least = survey.reached_by(k).expect("many more stretches");
            let reach = logits.iter().filter(|&&logit| logit >= least).count();
            assert!((k..=few).contains(&reach), "{reach} of {} for {k}", logits.len());
        };
        check(&spread(151_936), 1, 1);
        check(&spread(151_936), 20, 30);
        check(&spread(151_936), 400, 700);
        check(&spread(700), 20, 40);
        check(&[0.0; 700], 20, 700);
        let mut survey = Survey::default();
        survey.look(&spread(100)).expect("numbers");
        assert_eq!([0, 4, 100].map(|k| survey.reached_by(k)), [None; 3], "7 stretches");
    }
}
