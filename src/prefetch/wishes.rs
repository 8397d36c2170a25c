//! The ranges that one hint would have fetched, in the order of their reasons, and for each in that of their likelihood. In: ranges of chunks. Out: what is absent of
//! the first of them, merged with what lies close by, as long as one request may be.

use std::collections::VecDeque;

use super::chunks::ChunkRange;
use super::reason::{Planned, Reason};
use super::{Look, Presence};
use crate::cache::chunk::ChunkKey;
use crate::units::LayerId;

/// The most ranges that wait in one queue; the least likely are dropped for more likely ones.
const MOST_WISHES: usize = 1 << 14;
/// How many ranges in front are looked at for one whose hint has room: those of other layers may have.
const MOST_PASSED: usize = 64;
/// How many ranges are looked at for what lies close to one that is fetched.
const MOST_NEAR: usize = 256;

/// Whether what is wanted for a reason of a layer may be fetched now.
pub(super) type May<'a> = &'a dyn Fn(Reason, LayerId) -> bool;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Wishes(VecDeque<Planned>);

impl Wishes {
    /// More likely than all before for this reason.
    pub(super) fn push_front(&mut self, want: Planned) {
        if !want.chunks.is_empty() {
            let place = self.0.partition_point(|before| before.reason < want.reason);
            self.0.insert(place, want);
            self.0.truncate(MOST_WISHES);
        }
    }

    /// More likely than all before for their reasons, the first of them most of all.
    pub(super) fn push_all_front(&mut self, wants: Vec<Planned>) {
        for want in wants.into_iter().rev() {
            self.push_front(want);
        }
    }

    /// Less likely than all before for this reason.
    pub(super) fn push_back(&mut self, want: Planned) {
        if !want.chunks.is_empty() && self.0.len() < MOST_WISHES {
            let place = self.0.partition_point(|before| before.reason <= want.reason);
            self.0.insert(place, want);
        }
    }

    /// Those that wait, in order.
    #[cfg(test)]
    pub(super) fn iter(&self) -> impl Iterator<Item = &Planned> {
        self.0.iter()
    }

    /// Cuts the next absent chunks, at most `most`, from the first range for `reason` that may be fetched, merged with what follows it
    /// closely.
    pub(super) fn take(
        &mut self,
        reason: Reason,
        most: u32,
        gap: u32,
        may: May<'_>,
        look: Look<'_>,
    ) -> Option<Planned> {
        let first = self.0.partition_point(|want| want.reason < reason);
        let mut of_reason = self
            .0
            .range(first..)
            .take(MOST_PASSED)
            .take_while(|want| want.reason == reason);
        let place = first + of_reason.position(|want| may(reason, want.chunks.layer))?;
        let mut found: Option<Planned> = None;
        while let Some(Planned { chunks: front, .. }) = self.0.get_mut(place).filter(|want| want.reason == reason) {
            while front.first < front.end {
                let key = ChunkKey {
                    layer: front.layer,
                    index: front.first,
                };
                if look(key) == Presence::Absent {
                    match &mut found {
                        None if may(reason, front.layer) => found = Some(reason.of(key.into())),
                        None => return None,
                        Some(Planned { chunks: so_far, .. }) => {
                            let close = so_far.layer == key.layer
                                && key.index >= so_far.end
                                && key.index - so_far.end <= gap
                                && key.index - so_far.first < most
                                && may_bridge(key.layer, so_far.end, key.index, look);
                            if !close {
                                return found;
                            }
                            so_far.end = key.index + 1;
                        }
                    }
                    if found.is_some_and(|so_far| so_far.chunks.count() >= most) {
                        front.first += 1;
                        return found;
                    }
                }
                front.first += 1;
            }
            self.0.remove(place);
        }
        found
    }

    /// Lets `found` grow by what is wanted close to it, on both sides, up to `most` chunks: one request instead of two. Says
    /// whether it did.
    pub(super) fn grow(&self, found: &mut ChunkRange, most: u32, gap: u32, may: May<'_>, look: Look<'_>) -> bool {
        let absent = |index| {
            look(ChunkKey {
                layer: found.layer,
                index,
            }) == Presence::Absent
        };
        let at_first = (found.first, found.end);
        let (mut first, mut end) = at_first;
        loop {
            let before = (first, end);
            for Planned { chunks: near, reason } in self.0.iter().take(MOST_NEAR) {
                if near.layer != found.layer || near.is_empty() {
                    continue;
                }
                if near.end > end && near.first <= end.saturating_add(gap) && may(*reason, near.layer) {
                    let until = near.end.min(first.saturating_add(most));
                    if let Some(last) = (end..until).rev().find(|index| absent(*index))
                        && may_bridge(found.layer, end, last, look)
                    {
                        end = last + 1;
                    }
                }
                if near.first < first && near.end.saturating_add(gap) >= first && may(*reason, near.layer) {
                    let from = near.first.max(end.saturating_sub(most));
                    if let Some(next) = (from..first).find(|index| absent(*index))
                        && may_bridge(found.layer, next, first, look)
                    {
                        first = next;
                    }
                }
            }
            if (first, end) == before {
                break;
            }
        }
        (found.first, found.end) = (first, end);
        (first, end) != at_first
    }
}

/// Whether the chunks from `from` to `to` may be fetched along: not when one of them is on its way already.
pub(super) fn may_bridge(layer: LayerId, from: u32, to: u32, look: Look<'_>) -> bool {
    (from..to).all(|index| look(ChunkKey { layer, index }) != Presence::Coming)
}
