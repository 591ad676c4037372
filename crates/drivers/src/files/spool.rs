//! The list of what was there before the cut, on disk: which names existed, as which inodes.
//!
//! Written by the walk of PREPARE, read once more beside the walk of DRAIN. Both walk in the same
//! order, so that the two merge like sorted lists and memory stays as small as the deepest path.
//! The format is private to one run and one process; it is never read by another version.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use stillpoint_core::error::{IoContext, Result};
use stillpoint_core::tree::FileTime;

use super::client::Stat;

const ENTRY: u8 = 1;
const ENTER: u8 = 2;
const LEAVE: u8 = 3;
const STAT_BYTES: usize = 76;

/// A spool file; removed when the last user drops it.
#[derive(Debug)]
pub(super) struct Spool {
    path: PathBuf,
}

impl Drop for Spool {
    fn drop(&mut self) {
        // The scratch folder that holds it is removed after the run in any case.
        drop(std::fs::remove_file(&self.path));
    }
}

/// Writes entries as a walk meets them.
pub(super) struct Writer {
    out: BufWriter<File>,
    path: PathBuf,
}

impl Writer {
    pub(super) fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).or_io(|| format!("cannot make `{}`", path.display()))?;
        Ok(Self { out: BufWriter::with_capacity(64 * 1024, file), path: path.to_owned() })
    }

    pub(super) fn entry(&mut self, name: &[u8], stat: &Stat) -> Result<()> {
        self.record(ENTRY, name, stat)
    }

    pub(super) fn enter(&mut self, name: &[u8], stat: &Stat) -> Result<()> {
        self.record(ENTER, name, stat)
    }

    pub(super) fn leave(&mut self) -> Result<()> {
        self.put(&[LEAVE])
    }

    fn record(&mut self, tag: u8, name: &[u8], stat: &Stat) -> Result<()> {
        let mut head = [0; 2 + STAT_BYTES];
        head[0] = tag;
        head[1] = u8::try_from(name.len()).unwrap_or(u8::MAX);
        head[2..].copy_from_slice(&pack(stat));
        self.put(&head)?;
        self.put(name)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).or_io(|| format!("cannot write `{}`", self.path.display()))
    }

    pub(super) fn finish(mut self) -> Result<Spool> {
        self.out.flush().or_io(|| format!("cannot write `{}`", self.path.display()))?;
        Ok(Spool { path: self.path })
    }
}

fn pack(stat: &Stat) -> [u8; STAT_BYTES] {
    let mut bytes = [0; STAT_BYTES];
    let mut at = 0;
    let mut put = |field: &[u8]| {
        bytes[at..at + field.len()].copy_from_slice(field);
        at += field.len();
    };
    put(&stat.mode.to_le_bytes());
    put(&stat.size.to_le_bytes());
    put(&stat.inode.to_le_bytes());
    put(&stat.device.to_le_bytes());
    put(&stat.links.to_le_bytes());
    put(&stat.uid.to_le_bytes());
    put(&stat.gid.to_le_bytes());
    put(&stat.special.to_le_bytes());
    for time in [stat.mtime, stat.ctime] {
        put(&time.seconds.to_le_bytes());
        put(&time.nanos.to_le_bytes());
    }
    bytes
}

fn unpack(bytes: &[u8; STAT_BYTES]) -> Stat {
    let mut rest = &bytes[..];
    let mut take = |count: usize| {
        let (field, after) = rest.split_at(count);
        rest = after;
        let mut wide = [0; 8];
        wide[..count].copy_from_slice(field);
        u64::from_le_bytes(wide)
    };
    let half = |wide: u64| u32::try_from(wide).unwrap_or(u32::MAX);
    let (mode, size, inode, device) = (half(take(4)), take(8), take(8), take(8));
    let (links, uid, gid, special) = (take(8), half(take(4)), half(take(4)), take(8));
    let mut time = || FileTime { seconds: take(8).cast_signed(), nanos: half(take(4)) };
    let (mtime, ctime) = (time(), time());
    Stat { mode, size, inode, device, links, uid, gid, special, mtime, ctime, born: None }
}

/// One entry of the spool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) name: Vec<u8>,
    pub(super) stat: Stat,
    /// Whether its directory's entries follow, up to a leave.
    pub(super) enters: bool,
}

/// Reads a spool in order, one entry ahead. At the end it reports leaves for ever.
pub(super) struct Reader {
    input: BufReader<File>,
    path: PathBuf,
    next: Option<Record>,
}

impl Reader {
    pub(super) fn open(spool: &Spool) -> Result<Self> {
        let file = File::open(&spool.path).or_io(|| format!("cannot open `{}`", spool.path.display()))?;
        let input = BufReader::with_capacity(64 * 1024, file);
        let mut reader = Self { input, path: spool.path.clone(), next: None };
        reader.advance()?;
        Ok(reader)
    }

    /// The next entry of the current directory; `None` at its end.
    pub(super) fn peek(&self) -> Option<&Record> {
        self.next.as_ref()
    }

    /// Takes the next entry. After one that enters, its directory is the current one.
    pub(super) fn take(&mut self) -> Result<Option<Record>> {
        let taken = self.next.take();
        if taken.is_some() {
            self.advance()?;
        }
        Ok(taken)
    }

    /// Leaves the current directory, which must be at its end.
    pub(super) fn leave(&mut self) -> Result<()> {
        self.advance()
    }

    /// Skips what is left of the current directory and leaves it.
    pub(super) fn skip(&mut self) -> Result<()> {
        let mut depth = 1;
        while depth > 0 {
            match self.take()? {
                Some(record) => depth += u32::from(record.enters),
                None => {
                    depth -= 1;
                    self.leave()?;
                }
            }
        }
        Ok(())
    }

    fn advance(&mut self) -> Result<()> {
        self.next = self.read().or_io(|| format!("cannot read `{}`", self.path.display()))?;
        Ok(())
    }

    fn read(&mut self) -> std::io::Result<Option<Record>> {
        let mut tag = [0];
        if self.input.read(&mut tag)? == 0 || tag[0] == LEAVE {
            return Ok(None);
        }
        let mut head = [0; 1 + STAT_BYTES];
        self.input.read_exact(&mut head)?;
        let mut name = vec![0; head[0].into()];
        self.input.read_exact(&mut name)?;
        let stat = head[1..].first_chunk().map(unpack).ok_or(std::io::ErrorKind::InvalidData)?;
        Ok(Some(Record { name, stat, enters: tag[0] == ENTER }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(inode: u64) -> Stat {
        let time = FileTime { seconds: -5, nanos: 999_999_999 };
        let mode = 0o100_644;
        let size = u64::MAX;
        Stat {
            mode,
            size,
            inode,
            device: 3,
            links: 4,
            uid: 5,
            gid: u32::MAX,
            special: 7,
            mtime: time,
            ctime: time,
            born: None,
        }
    }

    #[test]
    fn what_was_written_is_read_in_order_and_folders_can_be_skipped() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut writer = Writer::create(&folder.path().join("spool")).expect("create");
        writer.entry(b"a", &stat(1)).expect("write");
        for name in [&b"b"[..], b"c"] {
            writer.enter(name, &stat(2)).expect("write");
            writer.enter(b"x", &stat(3)).expect("write");
            writer.entry(b"\xff", &stat(4)).expect("write");
            writer.leave().expect("write");
            writer.leave().expect("write");
        }
        writer.entry(b"d", &stat(5)).expect("write");
        let spool = writer.finish().expect("finish");

        let mut reader = Reader::open(&spool).expect("open");
        let name = |reader: &mut Reader| reader.take().expect("read").map(|record| (record.name, record.stat.inode));
        assert_eq!(name(&mut reader), Some((b"a".to_vec(), 1)));
        assert_eq!(name(&mut reader), Some((b"b".to_vec(), 2)));
        reader.skip().expect("skip");
        assert_eq!(name(&mut reader), Some((b"c".to_vec(), 2)));
        assert_eq!(name(&mut reader), Some((b"x".to_vec(), 3)));
        let record = reader.peek().expect("an entry").clone();
        assert_eq!((record.name.as_slice(), record.stat, record.enters), (&b"\xff"[..], stat(4), false));
        assert!(name(&mut reader).is_some() && name(&mut reader).is_none());
        reader.leave().expect("leave x");
        assert!(reader.peek().is_none());
        reader.leave().expect("leave c");
        assert_eq!(name(&mut reader), Some((b"d".to_vec(), 5)));
        assert!(reader.peek().is_none());
        drop(spool);
        assert!(!folder.path().join("spool").exists());
    }
}
