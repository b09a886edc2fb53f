//! Tables by hand, laws against a naive implementation, and the distribution drawn from.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn params() -> SamplerParams {
    SamplerParams::default()
}

fn sample(
    params: SamplerParams,
    logits: &[f32],
    history: &[u32],
    position: u64,
) -> Result<u32, SamplerError> {
    Sampler::new(params)?.sample(logits, history, position)
}

/// The ids that can be drawn, with their weights, ascending.
fn kept(params: &SamplerParams, logits: &[f32]) -> Vec<(u32, u64)> {
    let mut sampler = Sampler::new(params.clone()).unwrap();
    sampler.sample(logits, &[], 0).unwrap();
    sampler.candidates.iter().map(|candidate| (candidate.id, candidate.weight)).collect()
}

#[test]
fn greedy() {
    for (logits, want) in [
        (&[1.0f32] as &[f32], 0u32),
        (&[1.0, 3.0, 2.0], 1),
        (&[1.0, 3.0, 3.0], 1), // ties by lower id
        (&[-0.0, 0.0], 0),
        (&[0.0, -0.0], 0),
        (&[f32::MIN, f32::MIN], 0),
        (&[f32::MIN, f32::MAX], 1),
    ] {
        for temperature in [0.0, 1e-45] {
            let params = SamplerParams { temperature, ..params() };
            assert_eq!(sample(params, logits, &[], 7), Ok(want), "{logits:?}");
        }
    }
    let mut long = vec![0.0; 151_936];
    for place in [0, 15, 16, 77_777, 151_935] {
        long[place] = 1.0;
        assert_eq!(sample(SamplerParams::greedy(), &long, &[], 0), Ok(place as u32));
        long[place] = 0.0;
    }
}

/// Penalties and bias one by one, on the logits that greedy sees.
#[test]
fn adjusted_logits() {
    let base = [2.0f32, -2.0, 0.5, 0.0];
    let history = [0, 1, 1, 9, 1, 0];
    for (params, want) in [
        (params(), [2.0f32, -2.0, 0.5, 0.0]),
        (SamplerParams { repeat_penalty: 4.0, ..params() }, [0.5, -8.0, 0.5, 0.0]),
        (SamplerParams { presence_penalty: 0.5, ..params() }, [1.5, -2.5, 0.5, 0.0]),
        (SamplerParams { frequency_penalty: 0.5, ..params() }, [1.0, -3.5, 0.5, 0.0]),
        (SamplerParams { presence_penalty: -1.0, penalty_window: 1, ..params() }, [3.0, -2.0, 0.5, 0.0]),
        (SamplerParams { frequency_penalty: 0.5, penalty_window: 3, ..params() }, [1.5, -2.5, 0.5, 0.0]),
        (SamplerParams { presence_penalty: 9.0, penalty_window: 0, ..params() }, [2.0, -2.0, 0.5, 0.0]),
        (
            SamplerParams { logit_bias: BTreeMap::from([(3, 9.0), (0, -100.0)]), ..params() },
            [-98.0, -2.0, 0.5, 9.0],
        ),
        // In this order: (2 / 4 - 2 * 0.25) - 1 + 8
        (
            SamplerParams {
                repeat_penalty: 4.0,
                frequency_penalty: 0.25,
                presence_penalty: 1.0,
                logit_bias: BTreeMap::from([(0, 8.0)]),
                ..params()
            },
            [7.0, -9.75, 0.5, 0.0],
        ),
        (
            SamplerParams { presence_penalty: f32::MAX, repeat_penalty: f32::MAX, ..params() },
            [f32::MIN, f32::MIN, 0.5, 0.0],
        ),
    ] {
        let mut logits = base;
        params.adjust(&mut logits, &history).unwrap();
        assert_eq!(logits, want, "{params:?}");
        assert!(params.adjusts() || logits == base);
    }
}

/// Probabilities 8/16, 4/16, 2/16, 1/16 and 1/16, up to the last bits of `exp` and of the logits.
fn octaves() -> Vec<f32> {
    [1.0f32, 8.0, 1.0, 4.0, 2.0].map(f32::ln).to_vec()
}

#[test]
fn truncation() {
    let k = |top_k| SamplerParams { top_k, ..params() };
    let p = |top_p| SamplerParams { top_p, ..params() };
    let m = |min_p| SamplerParams { min_p, ..params() };
    for (params, want) in [
        (params(), &[0u32, 1, 2, 3, 4] as &[u32]),
        (k(1), &[1]),
        (k(3), &[1, 3, 4]),
        (k(4), &[0, 1, 3, 4]), // of two equal the lower id
        (k(99), &[0, 1, 2, 3, 4]),
        (p(1e-45), &[1]),
        (p(0.49), &[1]),
        (p(0.51), &[1, 3]),
        (p(0.74), &[1, 3]),
        (p(0.76), &[1, 3, 4]),
        (p(0.93), &[0, 1, 3, 4]),
        (p(0.94), &[0, 1, 2, 3, 4]),
        (m(0.99), &[1]),
        (m(0.49), &[1, 3]),
        (m(0.24), &[1, 3, 4]),
        (m(0.12), &[0, 1, 2, 3, 4]),
        // top-p takes its part of what top-k left: 8/12 here
        (SamplerParams { top_k: 2, top_p: 0.66, ..params() }, &[1]),
        (SamplerParams { top_k: 2, top_p: 0.67, ..params() }, &[1, 3]),
        (SamplerParams { top_p: 0.93, min_p: 0.2, ..params() }, &[1, 3, 4]),
        // Half the temperature squares the odds
        (SamplerParams { temperature: 0.5, min_p: 0.24, ..params() }, &[1, 3]),
        (SamplerParams { temperature: 1e-30, ..params() }, &[1]),
        (SamplerParams { temperature: 100.0, min_p: 0.97, ..params() }, &[0, 1, 2, 3, 4]),
    ] {
        let ids: Vec<u32> = kept(&params, &octaves()).into_iter().map(|(id, _)| id).collect();
        assert_eq!(ids, want, "{params:?}");
    }
}

/// Exactly the part that is needed is enough.
#[test]
fn truncation_at_equality() {
    let equal = [1.5f32; 4];
    for (params, want) in [
        (SamplerParams { top_p: 0.5, ..params() }, 2),
        (SamplerParams { top_p: 0.500_001, ..params() }, 3),
        (SamplerParams { min_p: 0.999_999, ..params() }, 4),
    ] {
        assert_eq!(
            kept(&params, &equal),
            (0..want).map(|id| (id, 1 << 32)).collect::<Vec<_>>(),
            "{params:?}"
        );
    }
}

#[test]
fn weights() {
    // ln 2 in f32, whose exp in f32 rounds to 0.5 within two units in the last place of a weight's 2^32
    let weights = kept(&params(), &[0.0, -std::f32::consts::LN_2, -22.0, -24.0]);
    assert_eq!(weights[0], (0, 1 << 32));
    assert!(weights[1].1.abs_diff(1 << 31) <= 256, "{weights:?}");
    assert_eq!(weights[2], (2, 1)); // exp(-22) * 2^32 is 1.198
    assert_eq!(weights.len(), 3);
    // The shortcut for far logits gives what exp gives.
    assert_eq!((f64::from(math::exp(-23.0)) * 4_294_967_296.0).round_ties_even(), 0.0);
}

/// The compiled variants give the same bits.
#[test]
fn weights_on_any_processor() {
    let candidates = || -> Vec<Candidate> {
        let scaled = (0..200_000u32).map(|i| i as f32 * -1.15e-4);
        scaled.map(|scaled| Candidate { id: 0, logit: 0.0, scaled, weight: 0 }).collect()
    };
    let (mut dispatched, mut plain) = (candidates(), candidates());
    weigh(&mut dispatched);
    weigh_each(&mut plain);
    let of =
        |candidates: &[Candidate]| candidates.iter().map(|c| c.weight).filter(|&w| w > 0).collect::<Vec<_>>();
    assert!(of(&plain).len() > 100_000);
    assert!(of(&dispatched) == of(&plain));
}

#[test]
fn parts() {
    for (fraction, whole, want) in [
        (0.0, u64::MAX, 0u64),
        (1.0, u64::MAX, u64::MAX),
        (0.5, 7, 4),
        (0.25, 8, 2),
        (0.1, 10, 2), // f32's 0.1 is a little more than a tenth
        (0.9, 10, 9), // and its 0.9 a little less
        (f32::from_bits(1), 1, 1),
        (f32::from_bits(1), 0, 0),
        (f32::MIN_POSITIVE, u64::MAX, 1),
        (1.0 / 4_294_967_296.0, (1 << 32) + 1, 2),
    ] {
        assert_eq!(part(fraction, whole), want, "{fraction} {whole}");
    }
}

#[test]
fn drawing_covers_the_total() {
    let candidate = |id, weight| Candidate { id, logit: 0.0, scaled: 0.0, weight };
    let candidates = [candidate(3, 1), candidate(5, 2), candidate(9, 1)];
    for (bits, want) in
        [(0, 3), (u64::MAX / 4, 3), (1 << 62, 5), ((3 << 62) - 1, 5), (3 << 62, 9), (u64::MAX, 9)]
    {
        assert_eq!(draw(&candidates, bits), want, "{bits:#x}");
    }
}

#[test]
fn bad_parameters() {
    let bad = |change: fn(&mut SamplerParams), want: &str| {
        let mut params = params();
        change(&mut params);
        assert_eq!(Sampler::new(params).unwrap_err().to_string(), want);
    };
    bad(|p| p.temperature = -0.1, "temperature is -0.1; it must be from 0 to 100");
    bad(|p| p.temperature = 100.5, "temperature is 100.5; it must be from 0 to 100");
    bad(|p| p.temperature = f32::NAN, "temperature is NaN; it must be from 0 to 100");
    bad(|p| p.top_p = 0.0, "top_p is 0; it must be above 0 and at most 1");
    bad(|p| p.top_p = 1.1, "top_p is 1.1; it must be above 0 and at most 1");
    bad(|p| p.min_p = 1.0, "min_p is 1; it must be at least 0 and below 1");
    bad(|p| p.repeat_penalty = 0.0, "repeat_penalty is 0; it must be above 0 and finite");
    bad(|p| p.presence_penalty = f32::INFINITY, "presence_penalty is inf; it must be finite");
    bad(|p| p.frequency_penalty = f32::NAN, "frequency_penalty is NaN; it must be finite");
    bad(|p| p.logit_bias = BTreeMap::from([(1, f32::NAN)]), "logit_bias is NaN; it must be finite");
}

#[test]
fn bad_logits() {
    let check = |params: SamplerParams, logits: &[f32], want: &str| {
        assert_eq!(sample(params, logits, &[], 0).unwrap_err().to_string(), want);
    };
    let mut logits = vec![0.0; 100];
    (logits[41], logits[98], logits[99]) = (f32::NAN, f32::NAN, f32::NEG_INFINITY);
    for params in [params(), SamplerParams::greedy()] {
        check(params.clone(), &logits, "2 NaN and 1 infinite among 100 logits, the first at token id 41");
        check(
            params.clone(),
            &[f32::INFINITY],
            "0 NaN and 1 infinite among 1 logits, the first at token id 0",
        );
        check(params.clone(), &[], "there are no logits to choose from");
        let biased = SamplerParams { logit_bias: BTreeMap::from([(3, 1.0)]), ..params };
        check(biased, &[0.0; 3], "logit_bias: token id 3 is outside the vocabulary of 3 tokens");
    }
}

/// Pearson's chi-squared over 40,000 positions against the weights; 4 degrees of freedom, and the seeds are fixed.
#[test]
fn distribution() {
    let weights = kept(&params(), &octaves());
    let total: u64 = weights.iter().map(|(_, weight)| weight).sum();
    for seed in [0, 1, u64::MAX] {
        let mut sampler = Sampler::new(SamplerParams { seed, ..params() }).unwrap();
        let mut counts = [0u32; 5];
        let draws = 40_000;
        for position in 0..draws {
            counts[sampler.sample(&octaves(), &[], position).unwrap() as usize] += 1;
        }
        let chi: f64 = (weights.iter().zip(counts))
            .map(|(&(_, weight), count)| {
                let expected = draws as f64 * weight as f64 / total as f64;
                (f64::from(count) - expected).powi(2) / expected
            })
            .sum();
        assert!(
            chi < 18.5,
            "seed {seed}: {counts:?}, chi-squared {chi}, expected below 18.5 but once in 1000"
        );
    }
}

/// Buffers carry nothing over, and neither order of calls nor what was sampled before matters.
#[test]
fn no_state() {
    let params = SamplerParams { top_k: 3, top_p: 0.9, repeat_penalty: 1.3, seed: 5, ..params() };
    let mut sampler = Sampler::new(params.clone()).unwrap();
    let ids = |positions: &mut dyn Iterator<Item = u64>, sampler: &mut Sampler| -> BTreeMap<u64, u32> {
        positions.map(|at| (at, sampler.sample(&octaves(), &[1, 2], at).unwrap())).collect()
    };
    let forwards = ids(&mut (0..200), &mut sampler);
    sampler.sample(&[0.0; 1000], &[], 0).unwrap();
    assert_eq!(ids(&mut (0..200).rev(), &mut sampler), forwards);
    for (&at, &id) in &forwards {
        assert_eq!(sample(params.clone(), &octaves(), &[1, 2], at), Ok(id));
    }
    let other = SamplerParams { seed: 6, ..params };
    assert_ne!(ids(&mut (0..200), &mut Sampler::new(other).unwrap()), forwards);
}

/// What truncation must keep, by sorting everything and comparing exact products.
fn naive(logits: &[f32], k: usize, p: f32, m: f32) -> Vec<(u32, u64)> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: f32| (f64::from(math::exp(logit - max)) * 4_294_967_296.0).round_ties_even() as u64;
    let mut all: Vec<(f32, u32, u64)> = (0u32..).zip(logits).map(|(id, &l)| (l, id, weight(l))).collect();
    all.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap().then(a.1.cmp(&b.1)));
    all.truncate(if k == 0 { all.len() } else { k });
    all.retain(|&(.., weight)| weight > 0);
    // A test's fractions are multiples of 2^-20, so the products are exact integers.
    let millionths = |x: f32| u128::from((x * 1_048_576.0) as u32);
    let total: u128 = all.iter().map(|&(.., weight)| u128::from(weight)).sum();
    let mut sum = 0u128;
    let mut kept = Vec::new();
    for &(_, id, weight) in &all {
        kept.push((id, weight));
        sum += u128::from(weight);
        if sum << 20 >= millionths(p) * total {
            break;
        }
    }
    let heaviest = u128::from(all[0].2);
    kept.retain(|&(_, weight)| u128::from(weight) << 20 >= millionths(m) * heaviest);
    kept.sort();
    kept
}

proptest! {
    #[test]
    fn truncation_equals_naive(
        // Few distinct values, for ties, and many tokens, for the beginnings that top-p tries.
        logits in prop::collection::vec((-40i32..40).prop_map(|x| x as f32 / 4.0), 1..900),
        k in prop_oneof![Just(0usize), 1usize..40, 1usize..1000],
        p in prop_oneof![Just(1u32 << 20), 1u32..1 << 20],
        m in prop_oneof![Just(0u32), 0u32..1 << 20, 0u32..64],
    ) {
        let fraction = |x: u32| x as f32 / 1_048_576.0;
        let params = SamplerParams { top_k: k, top_p: fraction(p), min_p: fraction(m), ..params() };
        prop_assert_eq!(kept(&params, &logits), naive(&logits, k, fraction(p), fraction(m)));
    }

    /// No parameters and no finite logits lead to a panic or to an id that there is not.
    #[test]
    fn any_parameters(
        logits in prop::collection::vec(prop_oneof![any::<f32>(), -9f32..9.0], 1..40),
        numbers in prop::array::uniform6(prop_oneof![any::<f32>(), 0f32..2.0]),
        (top_k, seed, position) in any::<(usize, u64, u64)>(),
        history in prop::collection::vec(0u32..50, 0..80),
    ) {
        let [temperature, top_p, min_p, repeat_penalty, presence_penalty, frequency_penalty] = numbers;
        let params = SamplerParams {
            temperature, top_k, top_p, min_p, repeat_penalty, presence_penalty, frequency_penalty, seed, ..params()
        };
        match sample(params, &logits, &history, position) {
            Ok(id) => prop_assert!((id as usize) < logits.len()),
            Err(SamplerError::Parameter { .. }) => {}
            Err(error) => {
                let is_fault = matches!(error, SamplerError::NonFinite { .. });
                prop_assert!(is_fault && logits.iter().any(|logit| !logit.is_finite()), "{}", error);
            }
        }
    }
}

#[test]
fn log_probabilities() {
    let (chosen, top) = logprobs(&octaves(), 4, 3, u32::MAX).unwrap();
    assert!((chosen.logprob - (2.0f64 / 16.0).ln()).abs() < 1e-6);
    assert_eq!(top.iter().map(|token| token.id).collect::<Vec<_>>(), [1, 3, 4]);
    assert!((top[0].logprob - 0.5f64.ln()).abs() < 1e-6);
    let ids = |top| {
        logprobs(&octaves(), 0, top, u32::MAX)
            .unwrap()
            .1
            .into_iter()
            .map(|token| token.id)
            .collect::<Vec<_>>()
    };
    assert!(ids(0).is_empty());
    assert_eq!(ids(99), [1, 3, 4, 0, 2]);
    let (_, all) = logprobs(&octaves(), 0, 99, u32::MAX).unwrap();
    assert!((all.iter().map(|token| token.logprob.exp()).sum::<f64>() - 1.0).abs() < 1e-12);
    assert!(logprobs(&[f32::NAN], 0, 0, 1).is_err());
    assert!(logprobs(&[0.0], 1, 0, 1).is_err());
}

/// A head may have more rows than there are tokens: these are never chosen, and neither listed nor biased; but the numbers in
/// them count.
#[test]
fn rows_that_are_no_tokens() {
    let mut logits: Vec<f32> = (0..300).map(|i: u16| f32::from(i % 17)).collect();
    logits[260..].fill(1e30);
    for ids in [1, 17, 255, 260] {
        let base = SamplerParams { ids, ..params() };
        let all = [
            SamplerParams { temperature: 0.0, ..base.clone() },
            base.clone(),
            SamplerParams { top_k: 40, top_p: 0.9, ..base.clone() },
            SamplerParams { min_p: 0.1, temperature: 100.0, ..base.clone() },
            SamplerParams { repeat_penalty: 2.0, logit_bias: [(0, 9.0)].into(), ..base.clone() },
        ];
        for params in all {
            let cut = SamplerParams { ids: u32::MAX, ..params.clone() };
            for position in 0..50 {
                let history = [3, 280, 299];
                let got = sample(params.clone(), &logits, &history, position);
                assert_eq!(
                    got,
                    sample(cut.clone(), &logits[..ids as usize], &history, position),
                    "{params:?}"
                );
            }
            let mut sampler = Sampler::new(params).unwrap();
            assert_eq!(
                sampler.sample_allowed(&logits, &[], 0, Some(&[u32::MAX; 10])).map(|id| id < ids),
                Ok(true)
            );
        }
        let biased = SamplerParams { logit_bias: [(ids, 1.0)].into(), ..base.clone() };
        let outside = SamplerError::BiasedId { id: ids, len: ids as usize };
        assert_eq!(sample(biased, &logits, &[], 0), Err(outside));
        let (_, top) = logprobs(&logits, 0, 300, ids).unwrap();
        assert_eq!(top.len(), ids as usize);
        assert!(top.iter().all(|token| token.id < ids));
        // They are part of the distribution nevertheless: nobody says what the model did not.
        assert!(top[0].logprob < -1e29);
        let mut bad = logits.clone();
        (bad[0], bad[299]) = (f32::INFINITY, f32::NAN);
        let fault = SamplerError::NonFinite { nan: 1, infinite: 1, first: 0, len: 300 };
        assert_eq!(sample(base.clone(), &bad, &[], 0), Err(fault));
        bad[0] = 0.0;
        let fault = SamplerError::NonFinite { nan: 1, infinite: 0, first: 299, len: 300 };
        assert_eq!(sample(base, &bad, &[], 0), Err(fault));
    }
    assert_eq!(Sampler::new(SamplerParams { ids: 0, ..params() }).err(), Some(SamplerError::NoLogits));
}

#[test]
fn what_a_grammar_allows() {
    let logits = [5.0f32, 4.0, 3.0, f32::MIN];
    let check = |params: SamplerParams, allowed: &[u32], want| {
        let mut sampler = Sampler::new(params.clone()).unwrap();
        let got = sampler.sample_allowed(&logits, &[], 3, Some(allowed));
        assert_eq!(got, want, "{params:?} {allowed:?}");
    };
    let hot = SamplerParams { temperature: 100.0, ..params() };
    let biased = SamplerParams { logit_bias: BTreeMap::from([(1, f32::MIN), (0, 99.0)]), ..params() };
    for params in [SamplerParams::greedy(), params(), hot, biased] {
        for id in 0..4 {
            check(params.clone(), &[1 << id], Ok(id));
        }
        check(params.clone(), &[0], Err(SamplerError::NothingAllowed));
        check(params, &[], Err(SamplerError::NothingAllowed));
    }
    check(SamplerParams::greedy(), &[0b0110], Ok(1));
    // The guard comes first: a NaN that is not allowed is a numeric fault all the same.
    let mut sampler = Sampler::new(params()).unwrap();
    let fault = sampler.sample_allowed(&[0.0, f32::NAN], &[], 0, Some(&[1]));
    assert!(matches!(fault, Err(SamplerError::NonFinite { first: 1, .. })), "{fault:?}");
    // A mask that allows all changes nothing.
    let long: Vec<f32> = (0..100u8).map(|i| f32::from(i % 7)).collect();
    for position in 0..50 {
        let free = sample(params(), &long, &[], position);
        let mut sampler = Sampler::new(params()).unwrap();
        assert_eq!(sampler.sample_allowed(&long, &[], position, Some(&[u32::MAX; 4])), free);
    }
}
