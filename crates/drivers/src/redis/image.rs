//! What a master sends, as readers: the image, which ends in one of two ways, and the stream behind it.
//!
//! Everything that is read here is in the replica's queues as well. Apart from the thread that reads,
//! because how an image ends is a format of its own.

use std::io::{BufRead, Read};

use stillpoint_core::error::{Error, Result};

use super::edges::Collector;
use super::rdb::{Checksum, Item, Walker, module_type};
use super::replica::{ImageFacts, Link};

/// Bytes of the mark that ends an image of unknown length.
const MARK_BYTES: usize = 40;

/// Walks the image as it passes.
pub(super) fn walk(source: &mut ImageSource<'_>, facts: &mut ImageFacts, collector: Option<&Collector>) -> Result<()> {
    let mut walker = Walker::new(source)?;
    facts.format = format!("{}{}", if walker.is_valkey { "valkey " } else { "" }, walker.version);
    loop {
        match walker.next()? {
            Item::End => {
                facts.module_types = walker.modules.iter().map(|id| module_type(*id)).collect();
                return Ok(());
            }
            Item::ModuleAuxiliary(module) if walker.modules.contains(&module) => {
                facts.module_data.insert(module_type(module));
            }
            Item::Function(_) => facts.functions += 1,
            Item::Key(key) => {
                if !super::is_stamp(key.database, &key.name) {
                    *facts.keys.entry(key.database).or_default() += 1;
                }
                match collector {
                    Some(collector) if collector.wants(&key) => collector.key(&key, &mut walker)?,
                    _ => walker.skip_value(key.kind)?,
                }
            }
            Item::Auxiliary(..) | Item::ModuleAuxiliary(_) | Item::Other => {}
        }
    }
}

/// How the end of the image is known.
pub(super) enum Form {
    Length { left: u64 },
    Mark { mark: Box<[u8; MARK_BYTES]>, held: Vec<u8>, is_over: bool },
}

/// The image as it comes; everything read is in the queue as well.
pub(super) struct ImageSource<'a> {
    pub link: &'a mut Link,
    pub form: Form,
    pub checksum: Checksum,
}

impl ImageSource<'_> {
    /// The next bytes of the image; none at its end.
    pub fn piece(&mut self) -> Result<Vec<u8>> {
        let piece = match &mut self.form {
            Form::Length { left: 0 } | Form::Mark { is_over: true, .. } => return Ok(Vec::new()),
            Form::Length { left } => {
                let data = self.link.fill()?;
                let count = usize::try_from(*left).unwrap_or(usize::MAX).min(data.len());
                *left -= count as u64;
                let piece = data[..count].to_vec();
                self.link.connection.reader().consume(count);
                piece
            }
            Form::Mark { mark, held, is_over } => loop {
                let data = self.link.fill()?;
                let count = data.len();
                held.extend_from_slice(data);
                self.link.connection.reader().consume(count);
                let whole = held.len().saturating_sub(MARK_BYTES);
                *is_over = held.ends_with(&mark[..]);
                if whole > 0 || *is_over {
                    let tail = held.split_off(whole);
                    break std::mem::replace(held, tail);
                }
            },
        };
        self.checksum.update(&piece);
        self.link.keep_image(&piece)?;
        Ok(piece)
    }
}

impl Read for ImageSource<'_> {
    /// Hands out whole pieces only: the reader's buffer is larger than what a socket gives at once.
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let piece = self.piece().map_err(std::io::Error::other)?;
        let Some(room) = buffer.get_mut(..piece.len()) else {
            return Err(std::io::Error::other(Error::internal("a piece of the image is larger than its buffer")));
        };
        room.copy_from_slice(&piece);
        Ok(piece.len())
    }
}

/// The stream as it comes; everything read is in the queue as well.
pub(super) struct StreamSource<'a> {
    pub link: &'a mut Link,
}

impl Read for StreamSource<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let piece = self.link.fill().map_err(std::io::Error::other)?;
        let count = piece.len().min(buffer.len());
        buffer[..count].copy_from_slice(&piece[..count]);
        self.link.connection.reader().consume(count);
        self.link.keep_stream(&buffer[..count]).map_err(std::io::Error::other)?;
        Ok(count)
    }
}
