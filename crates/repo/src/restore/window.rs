//! A bounded part of a restore: the files that are written together, in the order of the packs.
//!
//! Apart from the walk so that the limits of memory stand in one place. A window ends anywhere,
//! also within a file: what is unfinished moves to the next one.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use stillpoint_core::Result;
use stillpoint_core::driver::Context;
use stillpoint_core::tree::{Metadata, Node};

use super::attributes::Losses;
use super::files::{Files, Slot, SlotState};
use super::place::{Place, shown};
use crate::Id;
use crate::format::pack::{BlobKind, PackEntry};
use crate::index::Location;
use crate::tree::blobs::Loader;
use crate::tree::fetch::{Wanted, fetch};

/// Most pieces of files in a window, 72 bytes each.
const PIECES_MAX: usize = 256 * 1024;
/// Most files, folders and links in a window, about 300 bytes each.
const ENTRIES_MAX: usize = 64 * 1024;

/// A further name of a file.
#[derive(Debug)]
pub(crate) struct Link {
    /// The folder of the further name.
    pub(crate) folder: u32,
    /// The further name.
    pub(crate) name: Box<[u8]>,
    /// The first name, from the top.
    pub(crate) first: Vec<Vec<u8>>,
}

/// One blob's place in one file.
#[derive(Debug)]
struct Piece {
    /// Number of the pack within the window.
    pack: u32,
    entry: PackEntry,
    slot: u32,
    offset: u64,
}

impl Wanted for Piece {
    fn pack(&self) -> u32 {
        self.pack
    }
    fn entry(&self) -> &PackEntry {
        &self.entry
    }
}

/// What was gathered and not carried out yet.
#[derive(Debug, Default)]
pub(crate) struct Window {
    slots: Vec<Slot>,
    pieces: Vec<Piece>,
    /// The packs in the order in which they were first met, which is about the order of the tree.
    packs: Vec<Id>,
    pack_numbers: HashMap<Id, u32>,
    empty: Vec<u32>,
    /// Hard links to be made once their files are there.
    pub(crate) links: Vec<Link>,
    /// Folders in which nothing more is to be done, innermost first.
    pub(crate) folders: Vec<(u32, Option<Metadata>)>,
}

impl Window {
    /// Whether it must be carried out before anything is added.
    pub(crate) fn is_full(&self) -> bool {
        self.pieces.len() >= PIECES_MAX || self.slots.len() + self.links.len() + self.folders.len() >= ENTRIES_MAX
    }

    /// Begins a file of `pieces` pieces and `size` bytes.
    pub(crate) fn add_file(&mut self, folder: u32, node: Node, size: u64, pieces: u64) {
        let index = u32::try_from(self.slots.len()).expect("a window is small");
        if pieces == 0 {
            self.empty.push(index);
        }
        self.slots.push(Slot {
            folder,
            name: node.name.into(),
            size,
            meta: node.meta,
            left: AtomicU64::new(pieces),
            state: Mutex::new(SlotState::default()),
        });
    }

    /// Adds the next piece of the file that was begun last.
    pub(crate) fn add_piece(&mut self, location: Location, offset: u64) {
        let Location { pack, entry } = location;
        let pack = *self.pack_numbers.entry(pack).or_insert_with(|| {
            self.packs.push(pack);
            u32::try_from(self.packs.len() - 1).expect("a window is small")
        });
        let slot = u32::try_from(self.slots.len() - 1).expect("a window is small");
        self.pieces.push(Piece { pack, entry, slot, offset });
    }

    /// Writes all files; a file that lacks pieces stays, as the first of the next window.
    pub(crate) fn carry_out(
        &mut self,
        loader: &Loader,
        place: &Place,
        owners: bool,
        losses: &Losses,
        context: &Context,
    ) -> Result<()> {
        self.pieces.sort_unstable_by_key(|piece| (piece.pack, piece.entry.offset));
        let files = Files::new(place, &self.slots, owners, losses);
        for index in self.empty.drain(..) {
            files.write_empty(index)?;
            context.advance(0, 1);
        }
        let name_of = |piece: &Piece| shown(&self.slots[piece.slot as usize].name);
        fetch(loader.repository(), loader.index(), &self.packs, &self.pieces, context, &name_of, &|pieces, blob| {
            for piece in pieces {
                let last = self.slots[piece.slot as usize].left.load(Ordering::Relaxed) == 1;
                files.write(piece.slot, piece.offset, blob.plain)?;
                context.advance(blob.plain.len() as u64, u64::from(last));
            }
            Ok(())
        })?;
        self.pieces.clear();
        self.packs.clear();
        self.pack_numbers.clear();
        let unfinished = self.slots.pop().filter(|slot| slot.left.load(Ordering::Acquire) > 0);
        self.slots.clear();
        self.slots.extend(unfinished);
        Ok(())
    }
}

/// Finds where each blob of a file lies, and the file's length.
///
/// # Errors
/// `Corrupt` if the index does not know a blob.
pub(crate) fn locate(loader: &Loader, name: &[u8], content: &[Id]) -> Result<u64> {
    let mut length = 0;
    for id in content {
        length += u64::from(piece_of(loader, name, id)?.entry.plain_length());
    }
    Ok(length)
}

/// Where one blob of a file lies: its pack and its entry there.
pub(crate) fn piece_of(loader: &Loader, name: &[u8], id: &Id) -> Result<Location> {
    loader.index().get(BlobKind::Data, id).ok_or_else(|| missing(name, id))
}

fn missing(name: &[u8], id: &Id) -> stillpoint_core::Error {
    let message = format!("a part of `{}` is not in the repository", shown(name));
    stillpoint_core::Error::new(stillpoint_core::Kind::Corrupt, message)
        .context("blob", id)
        .hint("`stillpoint check` lists everything that is missing")
}
