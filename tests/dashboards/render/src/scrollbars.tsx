// In place of react-custom-scrollbars-2, whose module cannot be bundled as an ES module: pictures do not scroll.
import type { ReactNode } from 'react';

export default function Scrollbars({ children }: { children?: ReactNode }) {
  return <div style={{ height: '100%', overflow: 'hidden' }}>{children}</div>;
}
